"""A batch in parts: each sample keeps its hard negatives, and what a batch lacks is said."""

import torch

from dsclip.data import Batch
from dsclip.data.batch import LoadReport, summed

OWNER = torch.tensor([0, 2, 2, 3, 5])


def batch(**more) -> Batch:
    return Batch(
        torch.arange(6 * 12).reshape(6, 3, 2, 2), torch.arange(12).reshape(6, 2), torch.arange(6) + 100, **more
    )


def test_rows_hold_their_own_hard_negatives_and_count_from_their_first():
    whole = batch(keys=torch.arange(6), hard_tokens=torch.arange(10).reshape(5, 2), hard_owner=OWNER)
    parts = [whole.rows(0, 2), whole.rows(2, 5), whole.rows(5, 6)]
    assert [len(p) for p in parts] == [2, 3, 1]
    for name in ("images", "tokens", "sample_ids", "keys", "hard_tokens"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)), name
    assert [p.hard_owner.tolist() for p in parts] == [[0], [0, 0, 1], [0]]


def test_a_batch_of_images_tokens_and_ids_has_no_other_tensors():
    assert batch().tensors().keys() == batch().rows(1, 3).tensors().keys() == {"images", "tokens", "sample_ids"}
    moved = batch(keys=torch.arange(6)).to(torch.device("meta"))
    assert moved.images.device.type == "meta"
    assert {moved.tensors()[name].device.type for name in ("tokens", "keys", "sample_ids")} == {"cpu"}, (
        "lengths are read there"
    )


def test_reports_of_parts_add_up():
    parts = [LoadReport(["a"], 3, {"no image": 2}, seconds=1.0), LoadReport(["b"], 2, {"no image": 1}, seconds=0.5)]
    assert summed(parts) == LoadReport(["a", "b"], 5, {"no image": 3}, seconds=1.5)
