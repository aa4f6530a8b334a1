"""Runs that are stopped, extended, rewound, continued elsewhere or refused, and evaluations that fail, on two ranks."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from dsclip.checkpoint import read_manifest
from dsclip.checkpoint.manifest import MANIFEST, verify
from dsclip.files import sha256
from tests.distributed.launch import WORKERS, run_ranks
from tests.shard_files import sample, write_tar


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    """40 samples of which four are bad."""
    folder = tmp_path_factory.mktemp("runs")
    members = {f"{i:03d}": sample(i, captions=3) for i in range(40)}
    for name in ("003", "011", "019", "027"):
        members[name]["jpg"] = b"no picture"
    (folder / "shards").mkdir()
    full = folder / "runs" / "full"
    full.mkdir(parents=True)
    mounted = (
        os.geteuid() == 0 and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", full]).returncode
    )
    write_tar(folder / "shards" / "0.tar", members)
    try:
        run_ranks(WORKERS / "runs_worker.py", 2, folder / "results.json", folder, timeout_s=900)
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", full], check=True)


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


def steps(result) -> dict:
    return {m["step"]: m for m in result["metrics"] if "loss" in m}


def names(*steps) -> list[str]:
    return [f"step_{s:08d}" for s in steps]


def succeeded(result) -> dict:
    assert result["error"] is None, result["error"]
    return result


def test_a_run_that_is_resumed_at_its_end_and_extended_skips_no_batch(results):
    whole = steps(succeeded(results["whole"]))
    assert len({m["batch_hash"] for m in whole.values()}) == 6
    assert succeeded(results["part again"])["checkpoints"] == names(1, 2, 3)
    for case in ("part extended", "fork extended"):
        extended = steps(succeeded(results[case]))
        assert all(extended[s]["batch_hash"] == whole[s]["batch_hash"] for s in (4, 5, 6)), case
    forked = steps(results["fork extended"])
    assert [forked[s]["loss"] for s in (4, 5, 6)] == [whole[s]["loss"] for s in (4, 5, 6)]


@pytest.mark.parametrize("name, rank, latest", [("SIGTERM", 0, 3), ("SIGUSR1", 1, 4)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_nothing_is_lost(results, name, rank, latest):
    stopped = results[f"stopped_by_{name}"]
    [saved] = stopped["checkpoints"]
    step = int(saved.removeprefix("step_"))
    assert 3 <= step <= latest, "rank 0 may have decided on that step before it hears of another rank's signal"
    said = f"RunStopped: stopped by {name} to rank {rank} after step {step} of 6, which is saved in"
    assert all(error.startswith(said) and "--resume auto" in error for error in stopped["ranks"])
    again = results[f"stopped_by_{name} again"]
    whole, parts = steps(succeeded(results["whole"])), steps(succeeded(again))
    assert {s: (m["loss"], m["batch_hash"]) for s, m in parts.items()} == {
        s: (m["loss"], m["batch_hash"]) for s, m in whole.items()
    }


def test_a_rewind_archives_the_later_branch_and_keeps_its_own_checkpoints(folder, results):
    rewound = succeeded(results["rewound"])
    assert rewound["checkpoints"] == names(3, 4)
    archived = folder / "runs" / "whole" / "archive" / "branch_1_after_step_00000002"
    assert (
        f"rewound to step 2: the later checkpoints (step 3, 4, 5, 6) and their curves were moved to {archived}"
        in (rewound["shown"])
    )
    assert sorted(p.name for p in (archived / "checkpoints").iterdir()) == names(3, 4, 5, 6)
    assert verify(archived / "checkpoints" / "step_00000006")["step"] == 6
    lines = [json.loads(line) for line in (archived / "metrics.jsonl").read_text().splitlines()]
    assert lines == results["whole"]["metrics"]
    assert list((archived / "tb").iterdir()) and json.loads((archived / "summary.json").read_text())["steps"] == 6


def test_a_rewound_run_continues_its_own_branch(folder, results):
    assert "continued from" in results["rewound on"]["shown"]
    assert succeeded(results["rewound on"])["checkpoints"][-1] == "step_00000005"
    assert list(steps(results["rewound on"])) == [1, 2, 3, 4, 5]
    manifest = read_manifest(folder / "runs" / "whole" / "checkpoints" / "step_00000005")
    assert (manifest["lineage"]["branch"], manifest["lineage"]["start"]) == (2, 2)
    assert manifest["lineage"]["steps"] == [1, 2, 3, 4]


def test_another_runs_checkpoint_starts_under_a_new_name_or_is_refused(folder, results):
    forked, part = (read_manifest(folder / "runs" / n / "checkpoints" / "step_00000003") for n in ("fork", "part"))
    parent = folder / "runs" / "part" / "checkpoints" / "step_00000003"
    assert forked["lineage"]["parent"] == {
        "run": part["lineage"]["run"], "step": 3, "path": str(parent), "sha256": sha256(parent / MANIFEST),
    }  # fmt: skip
    assert forked["lineage"]["run"] != part["lineage"]["run"]
    refused = results["another run's"]
    assert all(e.startswith("UserError") and "Continue from it in a folder of its own" in e for e in refused["ranks"])
    assert refused["metrics"] == results["rewound on"]["metrics"]


def test_a_run_that_reached_more_steps_and_another_loss_are_sentences(results):
    assert all("train.steps is 2, and" in e and "is at step 6 already" in e for e in results["too short"]["ranks"])
    for error in results["another loss"]["ranks"]:
        assert error.startswith("UserError") and "loss.name sigmoid learns a temperature and a bias" in error


def test_what_a_resume_changes_is_said(results):
    shown, summary = (results["part extended"][k] for k in ("shown", "summary"))
    for line in ("optim.lr 0.002 → 0.001", "data.flip False → True", "train.steps 3 → 6"):
        assert f"changed since the checkpoint: {line}" in shown
    assert "the learning rate of step 4 is therefore 0.001 instead of 0.002" in shown
    assert "Done: 6 steps, 3 of them in this launch" in shown
    assert summary["launch"]["steps"] == 3 and [r["step"] for r in summary["resumes"]] == [3]
    assert summary["resumes"][-1]["changes"]["optim.lr"] == [0.002, 0.001]
    assert "changed since" not in results["part again"]["shown"]


def test_counts_go_on_over_a_resume_and_are_those_of_all_ranks(results):
    whole, extended = results["whole"], results["part extended"]
    for key in ("samples_read", "bad_samples"):
        assert steps(whole)[6][key] == steps(extended)[6][key] == sum_of(whole["summary"][key])
        assert extended["summary"][key] == whole["summary"][key]
    assert whole["summary"]["bad_samples"]["undecodable image"] >= 8  # more than two epochs of four
    last = next(line for line in whole["shown"].splitlines() if line.startswith("step 6/6"))
    assert last.endswith(f"· {sum_of(whole['summary']['bad_samples'])} bad samples")


def sum_of(value) -> int:
    return sum(value.values()) if isinstance(value, dict) else value


def test_what_an_interrupted_save_left_is_removed(results):
    assert "removed what an interrupted save left: step_00000009.tmp" in results["part extended"]["shown"]
    assert results["part extended"]["checkpoints"] == names(1, 2, 3, 4, 5, 6)


def test_a_scheduled_temperature_goes_on_from_that_of_the_initial_weights(results):
    whole, again = (steps(succeeded(results[case])) for case in ("scheduled", "scheduled again"))
    assert [again[s]["logit_scale"] for s in (3, 4)] == [whole[s]["logit_scale"] for s in (3, 4)]
    assert whole[1]["logit_scale"] != pytest.approx(1 / 0.07, rel=1e-4)


def test_an_evaluation_that_fails_is_reported_and_the_run_goes_on(results):
    for kind, error in (
        ("on all ranks", "the shard val/0.tar is gone"),
        ("on one rank", "ValueError: a picture that can't be drawn (ranks 1)"),
    ):
        result = succeeded(results[f"evaluation {kind}"])
        assert result["checkpoints"] == names(4) and "Done: 4 steps" in result["shown"]
        assert [m["evaluation_error"] for m in result["metrics"] if "evaluation_error" in m] == [error]
        assert result["summary"]["evaluation_errors"] == [{"step": 2, "error": error}]
        assert result["summary"]["eval"]["zeroshot"]["top1"] == 0.5
        assert f"evaluation  failed at step 2: {error}" in result["shown"]


def test_a_last_evaluation_that_fails_costs_no_checkpoint_and_is_no_success(folder, results):
    result = results["evaluation last"]
    assert result["checkpoints"] == names(4) and result["summary"]["eval"] == {}
    for error in result["ranks"]:
        assert error.startswith("RunFailed: the run is complete and saved in") and "val/0.tar is gone" in error


def test_checkpoints_are_saved_by_the_clock(results):
    assert succeeded(results["by the clock"])["checkpoints"] == names(1, 2, 3)


def test_ranks_meet_or_find_that_others_are_elsewhere(results):
    assert results["meetings"] == [None, ["rank 0", "rank 1"]]


def test_a_disk_that_is_full_for_now_stops_no_run_before_its_end(results):
    full = results["full"]
    if full is None:
        pytest.skip("a small file system can't be mounted here")
    assert full["checkpoints"] == names(1)
    assert "step 2: NOT saved, and the run goes on: a checkpoint takes" in full["shown"]
    assert list(steps(full)) == [1, 2, 3]
    assert all(error.startswith("NoRoom: a checkpoint takes") for error in full["ranks"]), full


def test_no_lock_stays_behind(folder, results):
    assert not list(Path(folder).glob("runs/*/run.lock*"))


def test_a_teacher_beside_the_student_is_there_from_the_first_step_on_and_when_the_run_goes_on(results):
    for case in ("its teacher", "taught", "taught on"):
        for step in steps(succeeded(results[case])).values():
            assert step["loss"] == pytest.approx(step["terms/pair"] + step["terms/distill_image_text"], rel=1e-6)
    same = steps(results["its teacher"])[1]["terms/distill_image_text"]
    others = [step["terms/distill_image_text"] for step in steps(results["taught on"]).values()]
    assert len(others) == 3 and 0 <= same < min(others) / 20  # the student computes in bf16, the teacher in float32
