"""Runs that go back after a spike, or after steps that were not finite, and never meet the batches that led to it again."""

import itertools
import json
import math

import numpy as np
import pytest

from dsclip.checkpoint import read_manifest
from dsclip.config import load_recipe
from dsclip.data import build_loader, load_tokenizer
from dsclip.files import sha256
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


@pytest.fixture(scope="module")
def in_order(folder):
    """{number: hash of the sample ids} of the global batches as they would come, read by a single loader."""
    recipe = load_recipe("demo", [f"data.train_shards={folder}/shards"])
    loader = build_loader(
        recipe.data, tokenizer=load_tokenizer("demo"), image_size=64, context_length=16, global_batch_size=16, seed=recipe.train.seed
    )  # fmt: skip
    return {batch.state["batches"]: digest(batch.sample_ids.tolist()) for batch in itertools.islice(loader, 36)}


def digest(ids: list[int]) -> str:
    return sha256([np.array(ids, dtype=np.int64).tobytes()])[:16]


def steps(result) -> dict:
    assert result["error"] is None, result["error"]
    return {m["step"]: m for m in result["metrics"] if "loss" in m}


def hashes(result) -> dict:
    return {step: m["batch_hash"] for step, m in steps(result).items()}


def test_a_spike_is_left_behind_with_its_batches(folder, results, in_order):
    back = hashes(results["back"])
    assert [back[s] for s in range(1, 27)] == [in_order[b] for b in (*range(1, 11), *range(21, 37))]
    said = results["back"]["shown"]
    assert (
        "the loss jumped in steps 19 to 20: " in said
        and "went back to step 10, and on without batches 11 to 20" in said
    )
    lines = [json.loads(x) for x in (folder / "runs" / "back" / "skipped_batches.jsonl").read_text().splitlines()]
    assert {line["batch"]: digest(line["sample_ids"]) for line in lines} == {b: in_order[b] for b in range(11, 21)}
    [event] = [m for m in results["back"]["metrics"] if "rollbacks" in m]
    assert (event["step"], event["rollbacks"], event["skipped_from"], event["skipped_to"]) == (10, 1, 11, 20)
    summary = results["back"]["summary"]
    assert summary["resumes"] == [] and summary["left_out_batches"] == [[11, 20]]
    [spike], [back] = summary["spikes"], summary["rollbacks"]
    assert (spike["steps"], back["step"], back["batches"]) == ([19, 20], 10, [11, 20]) and back["why"] in said
    assert summary["launch"]["from_step"] == 0 and summary["launch"]["steps"] == 36
    assert summary["samples_read"] == 16 * (20 + 10 + 16), "also what it went back over, and what it left out"
    assert "Done: 26 steps. This launch went back, made 36 steps" in said
    assert read_manifest(folder / "runs" / "back" / "checkpoints" / "step_00000026")["lineage"]["skipped"] == [[11, 20]]


def test_who_goes_on_in_new_processes_leaves_out_the_same_and_gives_the_same_losses(results):
    """Killed after it went back and before it saved again: also says that weights were loaded in place as in a new process."""
    assert "lost" in results["killed"]["error"] and max(s["step"] for s in results["killed"]["metrics"]) == 12
    same = ("loss", "grad_norm", "logit_scale", "batch_hash")
    back, again = steps(results["back"]), steps(results["killed again"])
    assert {s: [m[k] for k in same] for s, m in back.items()} == {s: [m[k] for k in same] for s, m in again.items()}


def test_another_number_of_ranks_leaves_out_the_same(results):
    back, elsewhere = steps(results["back"]), steps(results["elsewhere"])
    assert hashes(results["back"]) == hashes(results["elsewhere"])
    assert [m["loss"] for m in elsewhere.values()] == pytest.approx([m["loss"] for m in back.values()], rel=0.05)


def test_without_a_checkpoint_from_before_it_a_spike_is_told_and_changes_nothing(results, in_order):
    [event] = [m for m in results["nothing saved"]["metrics"] if "spike_from" in m]
    assert (event["step"], event["spike_from"]) == (13, 12) and event["spike_loss"] > 1.2 * event["spike_usual"]
    assert hashes(results["nothing saved"]) == {s: in_order[s] for s in range(1, 16)}
    assert (
        "no checkpoint from before step 4 is there to go back to, so the run goes on"
        in results["nothing saved"]["shown"]
    )


def test_a_run_that_went_back_as_often_as_it_may_ends_in_a_later_launch_too(results):
    """Step 29 is batch 39; what the rule knew of the steps before came with the checkpoint."""
    assert all(error.startswith("RunDiverged: the loss jumped in steps 29 to 30") for error in results["once"]["ranks"])
    assert "gone back 1 times already (train.max_rollbacks)" in results["once"]["error"]
    assert "step_00000030" not in results["once"]["checkpoints"], "a step is judged before it is saved"


def test_steps_that_are_not_finite_are_left_behind_too(results, in_order):
    found = hashes(results["not finite"])
    assert [found[s] for s in range(1, 19)] == [in_order[b] for b in (*range(1, 14), *range(16, 21))]
    assert all(math.isfinite(m["loss"]) for m in steps(results["not finite"]).values())
    assert (
        "steps 14 to 15 were not finite (features on 2 of 2 ranks): went back to step 10, and on without batches 14 to 15"
        in results["not finite"]["shown"]
    )
