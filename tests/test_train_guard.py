"""Batches that a run leaves out, and what is written of them."""

import json

import torch

from dsclip.checkpoint import Lineage
from dsclip.data.batch import Batch, LoadReport
from dsclip.train.guard import RollBack, without_skipped


def batch(number: int) -> Batch:
    report = LoadReport(journal=[{"shard": f"{number}.tar", "what": "damaged", "detail": ""}] if number % 2 else [])
    return Batch(
        torch.zeros(1, 3, 2, 2), torch.zeros(1, 4), torch.tensor([number]), state={"batches": number}, report=report
    )


def test_batches_are_left_out_by_number_and_what_is_told_of_their_shards_is_kept():
    lineage = Lineage("a", skipped=((2, 4), (7, 7)))
    found = list(without_skipped(map(batch, range(1, 10)), lineage))
    assert [b.state["batches"] for b in found] == [1, 5, 6, 8, 9]
    journals = [[int(entry["shard"].split(".")[0]) for entry in b.report.journal] for b in found]
    assert journals == [[1], [3, 5], [], [7], [9]]
    assert [b.state["batches"] for b in without_skipped(map(batch, range(3)), Lineage("a"))] == [0, 1, 2]


def test_every_batch_that_is_left_out_has_a_line(tmp_path):
    for first in (5, 9):
        RollBack("it jumped", 3, (first, first + 1), {first: None, first + 1: [7, 8]}).write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "skipped_batches.jsonl").read_text().splitlines()]
    assert [(line["batch"], line["sample_ids"]) for line in lines] == [(5, None), (6, [7, 8]), (9, None), (10, [7, 8])]
