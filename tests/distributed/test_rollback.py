"""Runs that go back after a spike, or after steps that were not finite, and never meet the batches that led to it again."""

import json
import math

import pytest

from dsclip.checkpoint import read_manifest
from tests.distributed.launch import WORKERS, run_ranks
from tests.shard_files import sample, write_tar


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollback")
    (folder / "shards").mkdir()
    write_tar(folder / "shards" / "0.tar", {f"{i:03d}": sample(i) for i in range(60)})
    for which, ranks in (("first", 2), ("elsewhere", 1)):
        run_ranks(WORKERS / "rollback_worker.py", ranks, folder / f"{which}.json", folder, which, timeout_s=600)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return {
        k: v for name in ("first", "elsewhere") for k, v in json.loads((folder / f"{name}.json").read_text()).items()
    }


def steps(result) -> dict:
    assert result["error"] is None, result["error"]
    return {m["step"]: m for m in result["metrics"] if "loss" in m}


def hashes(result) -> dict:
    return {step: m["batch_hash"] for step, m in steps(result).items()}


def test_a_spike_is_left_behind_with_its_batches(folder, results):
    plain, back = hashes(results["plain"]), hashes(results["back"])
    assert list(back) == list(range(1, 37)) and len(set(plain.values())) == 46
    assert [back[s] for s in back] == [plain[s if s <= 20 else s + 10] for s in back], "batches 21 to 30 are left out"
    said = results["back"]["shown"]
    assert (
        "the loss jumped in steps 29 to 30: " in said
        and "went back to step 20, and on without batches 21 to 30" in said
    )
    lines = [json.loads(x) for x in (folder / "runs" / "back" / "skipped_batches.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines] == list(range(21, 31))
    assert all(len(line["sample_ids"]) == 16 for line in lines)
    [event] = [m for m in results["back"]["metrics"] if "rollbacks" in m]
    assert (event["step"], event["rollbacks"], event["skipped_from"], event["skipped_to"]) == (20, 1, 21, 30)
    assert results["back"]["summary"]["resumes"] == [{"step": 20, "changes": {}}]
    assert read_manifest(folder / "runs" / "back" / "checkpoints" / "step_00000036")["lineage"]["skipped"] == [[21, 30]]


def test_who_goes_on_in_new_processes_leaves_out_the_same_and_gives_the_same_losses(results):
    """Killed after it went back and before it saved again: also says that weights were loaded in place as in a new process."""
    assert "lost" in results["killed"]["error"] and max(s["step"] for s in results["killed"]["metrics"]) == 22
    same = ("loss", "grad_norm", "logit_scale", "batch_hash")
    back, again = steps(results["back"]), steps(results["killed again"])
    assert {s: [m[k] for k in same] for s, m in back.items()} == {s: [m[k] for k in same] for s, m in again.items()}


def test_another_number_of_ranks_leaves_out_the_same(results):
    back, elsewhere = steps(results["back"]), steps(results["elsewhere"])
    assert hashes(results["back"]) == hashes(results["elsewhere"])
    assert [m["loss"] for m in elsewhere.values()] == pytest.approx([m["loss"] for m in back.values()], rel=0.05)


def test_without_a_checkpoint_from_before_it_a_spike_is_told_and_changes_nothing(results):
    [event] = [m for m in results["nothing saved"]["metrics"] if "spike_from" in m]
    assert (event["step"], event["spike_from"]) == (23, 22) and event["spike_loss"] > 1.2 * event["spike_usual"]
    plain = hashes(results["plain"])
    assert hashes(results["nothing saved"]) == {s: plain[s] for s in range(1, 26)}
    assert (
        "no checkpoint from before step 14 is there to go back to, so the run goes on"
        in results["nothing saved"]["shown"]
    )


def test_a_run_that_went_back_as_often_as_it_may_ends_in_a_later_launch_too(results):
    """Step 39 is batch 49; what the rule knew of the steps before came with the checkpoint."""
    assert all(error.startswith("RunDiverged: the loss jumped in steps 39 to 40") for error in results["once"]["ranks"])
    assert "gone back 1 times already (train.max_rollbacks)" in results["once"]["error"]
    assert "step_00000040" not in results["once"]["checkpoints"]


def test_steps_that_are_not_finite_are_left_behind_too(results):
    plain, found = hashes(results["plain"]), hashes(results["not finite"])
    assert [found[s] for s in found] == [plain[s if s <= 15 else s + 10] for s in range(1, 29)]
    assert all(math.isfinite(m["loss"]) for m in steps(results["not finite"]).values())
    assert (
        "steps 24 to 25 were not finite (features on 2 of 2 ranks): went back to step 15"
        in results["not finite"]["shown"]
    )
