"""Batches that a run leaves out, what is written of them, and what a guard remembers over a resume."""

import json

import torch

from dsclip.checkpoint import Lineage
from dsclip.config.train_section import TrainSection
from dsclip.data.batch import Batch, LoadReport
from dsclip.distributed import Collectives
from dsclip.train.guard import Guard, RollBack, without_skipped
from dsclip.train.spike_rule import SpikeRule


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


def test_a_step_that_was_saved_before_it_was_judged_is_judged_after_the_resume():
    """As when a signal stops the run. Neither the folder nor what people see has a part in it."""
    rule = SpikeRule(10, 8.0)
    for step in range(1, 12):
        rule.judge(step, 1.0, 2.0)
    for norm in (2.5, None):
        state = {"rule": rule.state(), "recent": [[11, 14], [12, 15]], "unjudged": [12, 1.25, norm]}
        guard = Guard(TrainSection(spike_window=10), Collectives.single(), None, None, json.loads(json.dumps(state)))
        assert json.loads(json.dumps(guard.state())) == json.loads(json.dumps(state))
        guard.judge()
        after = guard.state()
        assert (after["unjudged"], after["rule"]["losses"][-1]) == (None, 1.25)
        assert after["rule"]["deviating"] == [(12, True)] and len(after["rule"]["log_norms"]) == 10
