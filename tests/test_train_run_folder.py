"""Who may run in a folder: the lock, places where no run can be, and what a resume finds there."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsclip.checkpoint import Lineage, newest_checkpoint
from dsclip.checkpoint.lineage import write_lineage
from dsclip.checkpoint.manifest import MANIFEST, write_manifest
from dsclip.checkpoint.store import CheckpointStore, remove_unfinished
from dsclip.config import load_recipe
from dsclip.distributed import Collectives
from dsclip.errors import UserError
from dsclip.train.metrics_log import SUPERSEDED, MetricsLog, read_trouble
from dsclip.train.run_folder import RunFolder, find_resume
from dsclip.train.run_lock import LOCK, RunLock
from tests.test_checkpoint_manifest import STATE

HOLD = """
import sys, time
from pathlib import Path
from dsclip.train.run_lock import RunLock
lock = RunLock.take(Path(sys.argv[1]), print)
print("locked", flush=True)
time.sleep(600)
"""


def holder(run_dir: Path) -> subprocess.Popen:
    """Another process that holds the folder."""
    root = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_run_is_refused_and_a_killed_one_taken_over(tmp_path):
    said = []
    other = holder(tmp_path / "run")
    try:
        with pytest.raises(UserError, match=f"another run is at work in .*: process {other.pid} on .*, started 20"):
            RunFolder(tmp_path / "run", "auto", Collectives.single())
    finally:
        os.kill(other.pid, signal.SIGKILL)  # and not waited for: a zombie holds nothing
    time.sleep(0.1)
    lock = RunLock.take(tmp_path / "run", said.append)
    assert len(said) == 1 and f"took over {tmp_path / 'run'} from process {other.pid}" in said[0]
    assert lock.held()
    lock.release()
    other.wait()
    assert not (tmp_path / "run" / LOCK).exists()
    RunLock.take(tmp_path / "new" / "run", print).release()
    assert not (tmp_path / "new" / "run").exists(), "it was created for nothing"


def test_a_process_number_that_was_given_again_is_no_holder(tmp_path):
    lock = RunLock.take(tmp_path, print)
    content = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps(content | {"process": "1"}))  # this process began at another time
    assert not lock.held()
    lock.release()
    said = []
    RunLock.take(tmp_path, said.append).release()
    assert "took over" in said[0]


def test_a_file_server_that_is_away_ends_no_run(tmp_path, monkeypatch):
    lock = RunLock.take(tmp_path, print)

    def away(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", away)
        assert lock.held()
    (tmp_path / LOCK).unlink()
    assert not lock.held()


def test_a_lock_that_was_taken_over_gets_no_sign_of_life_from_its_former_holder(tmp_path, monkeypatch):
    monkeypatch.setattr("dsclip.train.run_lock.HEARTBEAT_S", 0.02)
    RunLock.take(tmp_path, print)
    foreign_lock(tmp_path, age_s=1000)
    time.sleep(0.2)
    assert time.time() - (tmp_path / LOCK).stat().st_mtime > 900


def foreign_lock(run_dir: Path, age_s: float) -> None:
    content = {
        "host": "node7",
        "pid": 1,
        "started": "2026-01-01T00:00:00+00:00",
        "machine": ["node7", "x", "y"],
        "id": "z",
    }
    (run_dir / LOCK).write_text(json.dumps(content))
    os.utime(run_dir / LOCK, (time.time() - age_s,) * 2)


def test_a_lock_of_another_machine_is_judged_by_its_signs_of_life(tmp_path):
    said = []
    foreign_lock(tmp_path, age_s=1000)
    RunLock.take(tmp_path, said.append).release()
    assert len(said) == 1 and "took over" in said[0] and "node7" in said[0]
    foreign_lock(tmp_path, age_s=0)
    started = time.monotonic()
    RunLock.take(tmp_path, said.append, stale_after_s=0.5).release()
    assert time.monotonic() - started > 0.4
    assert "waiting for a sign of life" in said[1] and "took over" in said[2]


def test_a_lock_of_another_machine_that_is_touched_is_respected(tmp_path):
    foreign_lock(tmp_path, age_s=1)
    script = "import os, sys, time; time.sleep(1); os.utime(sys.argv[1])"
    toucher = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / LOCK)])
    with pytest.raises(UserError, match="process 1 on node7.*if you know that it has ended, remove .*run.lock"):
        RunLock.take(tmp_path, print, stale_after_s=60)
    assert toucher.wait() == 0


def test_a_lock_that_a_kill_left_empty_is_taken_over_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("dsclip.train.run_lock.WRITING_S", 0.2)
    (tmp_path / LOCK).touch()
    RunLock.take(tmp_path, print, stale_after_s=0.3).release()


def test_a_run_whose_lock_was_taken_over_writes_no_checkpoint(tmp_path):
    lock = RunLock.take(tmp_path, print)
    foreign_lock(tmp_path, age_s=0)

    class Engine:
        group = Collectives.single()
        step = 3

    with pytest.raises(UserError, match="another run took over"):
        CheckpointStore(tmp_path, 3, None, lock=lock).save(Engine(), {}, {})
    lock.release()
    assert (tmp_path / LOCK).exists() and not (tmp_path / "checkpoints").exists()


def test_places_where_no_run_can_be_are_sentences(tmp_path):
    (tmp_path / "file").write_text("x")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        for resume in ("none", "auto"):
            with pytest.raises(UserError, match="file is no folder.*change train.output or train.name"):
                find_resume(resume, run_dir)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link is no folder"):
        find_resume("none", tmp_path / "link" / "run")
    with pytest.raises(UserError, match="can't be written to .*choose another place with train.output=DIR"):
        RunFolder(Path("/proc/dsclip/run"), "none", Collectives.single())


def checkpoint(run_dir: Path, step: int, lineage: dict | None) -> Path:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    write_manifest(folder, STATE | {"step": step} | ({"lineage": lineage} if lineage else {}))
    return folder


def test_a_rewind_that_was_killed_half_way_is_not_undone(tmp_path):
    """`run.json` is written first: what it excludes is never continued, even where it stands as before."""
    for step in (2, 4, 6):
        checkpoint(tmp_path, step, {"run": "a", "branch": 1, "start": 0, "steps": []})
    write_lineage(tmp_path, Lineage("a", branch=2, start=2))
    assert find_resume("auto", tmp_path).name == "step_00000002"
    checkpoint(tmp_path, 3, {"run": "a", "branch": 2, "start": 2, "steps": [2]})
    assert newest_checkpoint(tmp_path).name == "step_00000003"


def test_checkpoints_of_earlier_versions_are_continued(tmp_path):
    for step in (2, 4):
        checkpoint(tmp_path, step, None)
    assert find_resume("auto", tmp_path).name == "step_00000004"


def test_a_rewind_of_an_earlier_version_s_run_that_was_killed_half_way_is_not_undone(tmp_path, monkeypatch):
    for step in (2, 4, 6):
        checkpoint(tmp_path, step, None)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsclip.train.run_folder._archive", killed)
    folder = RunFolder(tmp_path, str(tmp_path / "checkpoints" / "step_00000002"), Collectives.single())
    with pytest.raises(KeyboardInterrupt):
        folder.claim(load_recipe("demo"), {})
    folder.release()
    assert find_resume("auto", tmp_path).name == "step_00000002"


def test_a_run_from_another_s_checkpoint_that_was_killed_before_it_saved_begins_there_again(tmp_path):
    parent = checkpoint(tmp_path / "first", 4, {"run": "a", "branch": 1, "start": 0, "steps": []})
    folder = RunFolder(tmp_path / "second", str(parent), Collectives.single())
    folder.claim(load_recipe("demo"), {})
    folder.release()
    for _ in range(2):
        assert find_resume("auto", tmp_path / "second") == parent
        folder = RunFolder(tmp_path / "second", "auto", Collectives.single())
        folder.claim(load_recipe("demo"), {})
        folder.release()
    archived = tmp_path / "first" / "archive" / "branch_1_after_step_00000002" / "checkpoints" / parent.name
    archived.parent.mkdir(parents=True)
    parent.rename(archived)
    assert find_resume("auto", tmp_path / "second") == archived
    checkpoint(tmp_path / "first", 4, {"run": "a", "branch": 2, "start": 2, "steps": [2]})
    assert find_resume("auto", tmp_path / "second") == archived, "the new step 4 is of another branch"
    shutil.rmtree(archived)
    with pytest.raises(
        UserError,
        match=f"second has saved nothing yet and began from the checkpoint {parent}, which is gone or is another",
    ):
        find_resume("auto", tmp_path / "second")
    assert find_resume("none", tmp_path / "second") is None


def with_weights(run_dir: Path, step: int) -> Path:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(step))
    write_manifest(folder, STATE | {"step": step})
    return folder


def test_auto_passes_over_damaged_checkpoints_says_so_and_archives_them(tmp_path):
    good, changed, torn = (with_weights(tmp_path, step) for step in (2, 4, 6))
    (changed / "weights.bin").write_bytes(b"else")
    (torn / MANIFEST).write_text("{")
    folder = RunFolder(tmp_path, "auto", Collectives.single())
    assert folder.resume == good and folder.manifest["step"] == 2
    first, second = folder.messages
    assert f"{torn}/{MANIFEST} is damaged" in first
    assert f"{changed} is damaged: weights.bin has changed since it was written" in second
    assert all(line.endswith(f"The run goes on from {good}.") for line in (first, second))
    folder.claim(load_recipe("demo"), {})
    folder.release()
    assert {p.name for p in tmp_path.glob("archive/branch_1*/checkpoints/*")} == {changed.name, torn.name}
    assert find_resume("auto", tmp_path) == good


def test_a_damaged_checkpoint_that_was_named_or_is_the_last_is_an_error(tmp_path):
    good, changed = (with_weights(tmp_path, step) for step in (2, 4))
    (changed / "weights.bin").write_bytes(b"else")
    with pytest.raises(UserError, match="step_00000004 is damaged: weights.bin has changed"):
        RunFolder(tmp_path, str(changed), Collectives.single())
    (good / "weights.bin").unlink()
    with pytest.raises(
        UserError, match=f"no checkpoint of {tmp_path} can be continued. The newest: .*step_00000004 is damaged"
    ):
        RunFolder(tmp_path, "auto", Collectives.single())
    assert not (tmp_path / LOCK).exists()


def test_a_damaged_run_file_is_a_sentence(tmp_path):
    checkpoint(tmp_path, 2, None)
    (tmp_path / "run.json").write_text('{"run": 1')
    with pytest.raises(UserError, match="run.json is damaged"):
        find_resume("auto", tmp_path)


def test_an_interrupted_replacement_gives_the_old_checkpoint_back(tmp_path):
    folder = checkpoint(tmp_path, 2, None)
    folder.rename(folder.with_name(folder.name + ".old.tmp"))
    (tmp_path / "checkpoints" / "step_00000004.tmp").mkdir()
    assert remove_unfinished(tmp_path / "checkpoints") == ["step_00000004.tmp"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_who_goes_back_keeps_what_was_written_of_earlier_spikes_and_rollbacks(tmp_path):
    """Twice: the second time to before the first, with and without a checkpoint to archive; then a resume after a kill."""
    folder = RunFolder(tmp_path, "none", Collectives.single())
    folder.claim(load_recipe("demo"), {})
    for step in (10, 20, 30):
        checkpoint(tmp_path, step, vars(folder.lineage) | {"steps": []})

    def log(start: int, step: int, *spike: int, why: str = "") -> None:
        log = MetricsLog(tmp_path, True, start)
        if why:
            log.log(start, {"rollbacks": 1, "skipped_from": 21, "skipped_to": 32}, rollback=why)
        log.log(step, {"loss": 4.0})
        if spike:
            log.log(step, {"spike_from": spike[0], "spike_loss": 4.0, "spike_usual": 2.0})
        log.close()

    log(0, 32, 31)
    folder.go_back(before=23, skipped=(21, 32))
    folder.claim(load_recipe("demo"), {})  # archives step 30
    log(20, 22, 21, why="it jumped")
    folder.go_back(before=13, skipped=(11, 33))
    (tmp_path / "checkpoints" / "step_00000020").rename(tmp_path / "elsewhere")
    folder.claim(load_recipe("demo"), {})
    log(10, 15, why="again")
    log(10, 14)
    folder.release()
    spikes, rollbacks = read_trouble(tmp_path / "metrics.jsonl")
    assert [spike["steps"] for spike in spikes] == [[31, 32], [21, 22]]
    assert [(back["step"], back["why"]) for back in rollbacks] == [(20, "it jumped"), (10, "again")]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10] * 4 + [14] and lines[0]["of_step"] == 32


def test_lines_that_a_resume_supersedes_are_put_aside(tmp_path):
    log = MetricsLog(tmp_path, True)
    for step in (10, 20, 30):
        log.log(step, {"loss": float(step)})
    log.close()
    MetricsLog(tmp_path, True, start_step=20).close()
    assert [json.loads(line)["step"] for line in (tmp_path / SUPERSEDED).read_text().splitlines()] == [30]
