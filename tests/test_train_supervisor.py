"""Starting a run again after crashes: when, until when, and that nothing of a launch is left."""

import json
import os
import random
import signal
import subprocess
import sys

import psutil
import pytest

from dsclip.errors import UserError
from dsclip.train.supervisor.cli import parse, resuming, supervise
from dsclip.train.supervisor.journal import JOURNAL, RECORD, Journal, last_step, useful_seconds
from dsclip.train.supervisor.policy import DAY_S, LONGEST_DELAY_S, Policy
from tests.distributed.launch import REPOSITORY, SMALL, start, steps, train, wait_for


def test_a_run_that_is_done_or_has_wrong_input_is_not_started_again():
    policy = Policy(crashes_a_day=50, crashes_a_step=3)
    assert policy.after(0, 10, 0.0, done=True).delay_s is None
    assert policy.after(0, 10, 0.0, done=False).delay_s == 1.0, "DeepSpeed's runner ends so when its launch is killed"
    assert policy.after(2, 0, 0.0).delay_s is None
    assert policy.after(75, 5, 0.0).delay_s == 1.0, "stopped by a signal and saved"


def test_a_step_that_fails_three_times_in_a_row_ends_it_and_is_named():
    policy = Policy(crashes_a_day=50, crashes_a_step=3)
    assert [policy.after(1, step, 0.0).delay_s for step in (7, 8, 8)] == [1.0, 1.0, 4.0]
    given_up = policy.after(-9, 8, 0.0)
    assert given_up.delay_s is None and "signal 9 after step 8, 3 times in a row" in given_up.why
    assert "no longer finite" in policy.after(3, 9, 0.0).why


def test_delays_grow_to_five_minutes_and_crashes_of_the_last_day_count():
    policy = Policy(crashes_a_day=9, crashes_a_step=99)
    assert [policy.after(1, 0, 0.0).delay_s for _ in range(7)] == [
        1.0,
        4.0,
        16.0,
        64.0,
        256.0,
        LONGEST_DELAY_S,
        LONGEST_DELAY_S,
    ]
    policy = Policy(crashes_a_day=2, crashes_a_step=3)
    assert policy.after(1, 1, 0.0).delay_s and policy.after(1, 2, 10.0).delay_s
    assert policy.after(1, 3, DAY_S + 5).delay_s, "the first is more than a day ago"
    assert "crashed 3 times within a day" in policy.after(1, 4, DAY_S + 6).why


def line(step, samples_per_second):
    return json.dumps({"step": step, "samples": step * 64, "samples_per_second": samples_per_second}) + "\n"


def test_useful_seconds_are_those_of_the_steps_that_stand(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        line(10, 64)
        + line(20, 128)
        + json.dumps({"step": 20, "eval/zeroshot/top1": 0.5})
        + "\n"
        + line(30, 32)
        + '{"step": 4'
    )
    assert useful_seconds(tmp_path, 0) == 10 + 5 + 20
    assert useful_seconds(tmp_path, 15) == 2.5 + 20, "steps that were made before the supervisor came count for nothing"
    journal = Journal(tmp_path)
    journal.begin(100.0)
    record = journal.end(110.0, exit_code=1, step=30, decision="crash")
    assert record == {"launches": 1, "restarts": 0, "useful_seconds": 0.0, "wall_seconds": 10.0, "ettr": 0.0}
    Journal(tmp_path).begin(110.0)  # whose supervisor was killed
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\n{}\n" + line(40, 64))
    journal = Journal(tmp_path)
    journal.begin(115.0)
    record = journal.end(120.0, exit_code=0, step=40, decision="done")
    assert record == {"launches": 3, "restarts": 2, "useful_seconds": 10.0, "wall_seconds": 20.0, "ettr": 0.5}
    assert json.loads((tmp_path / RECORD).read_text()) == record


def test_the_command_resumes_its_run_or_is_refused(tmp_path):
    command, settings = resuming(["torchrun", "launchers/train.py", "train.name=x", f"train.output={tmp_path}"])
    assert command[-2:] == ["--resume", "auto"] and (settings.name, settings.output) == ("x", str(tmp_path))
    assert resuming([*command])[0] == command
    with pytest.raises(UserError, match="doesn't call launchers/train.py: sleep 5"):
        resuming(["sleep", "5"])
    with pytest.raises(UserError, match="--resume none would begin there again after each crash"):
        resuming(["python", "launchers/train.py", "--resume", "none"])
    with pytest.raises(UserError, match="--dry-run trains nothing"):
        resuming(["python", "launchers/train.py", "--dry-run"])
    with pytest.raises(UserError, match="--grace is -5 and must be above 0"):
        supervise(parse(["--grace=-5", "--", *command]))
    with pytest.raises(UserError, match="no-such-launcher can't be started"):
        supervise(parse(["--", "no-such-launcher", "launchers/train.py", f"train.output={tmp_path}"]))


ORPHANS = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if "RANK" not in os.environ:  # the launcher, which dies and leaves its ranks
    for rank in "01":
        subprocess.Popen([sys.executable, __file__, sys.argv[1]], env=os.environ | {"RANK": rank})
    while len(os.listdir(sys.argv[1])) < 2:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
time.sleep(600)
"""


def test_ranks_that_a_launcher_left_behind_are_ended(tmp_path):
    (tmp_path / "pids").mkdir()
    (tmp_path / "orphans.py").write_text(ORPHANS)
    script = (
        "import sys; from dsclip.train.supervisor.job import Job;"
        "print(Job([sys.executable, *sys.argv[1:]]).wait(lambda: False, grace_s=0.5))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "orphans.py"), str(tmp_path / "pids")],
                          capture_output=True, text=True, timeout=120, cwd=REPOSITORY)  # fmt: skip
    assert done.stdout == "-9\n", done.stderr
    pids = [int(name) for name in os.listdir(tmp_path / "pids")]
    assert len(pids) == 2 and not any(psutil.pid_exists(pid) for pid in pids)


def test_a_supervised_run_that_is_killed_at_random_ends_as_if_nothing_had_been(demo, tmp_path):
    options = [
        *SMALL,
        "train.steps=24",
        "train.save_every=2",
        "eval.every_steps=null",
        "train.export_hf=false",
        f"train.output={tmp_path}",
    ]
    whole = train(*options, "train.name=whole", ranks=1)
    assert whole.returncode == 0, whole.stdout
    run = tmp_path / "run"
    command = [sys.executable, "launchers/supervise.py", "--", sys.executable, "launchers/train.py",
               "--ds_config", "ds_configs/zero3_bf16.json", *options, "train.name=run"]  # fmt: skip
    rng = random.Random()
    with (tmp_path / "output").open("w") as output:
        supervisor = start(command, stdout=output)
        try:
            launches = psutil.Process(supervisor.pid)
            for kill_after in sorted(rng.sample(range(1, 14), 2)):
                # that step may be there already while the supervisor waits before its next launch
                wait_for(lambda after=kill_after: last_step(run) >= after and launches.children(), supervisor)
                [trainer] = launches.children()
                trainer.kill()
                trainer.wait()
            code = supervisor.wait(timeout=300)
        finally:
            if supervisor.poll() is None:
                os.killpg(supervisor.pid, signal.SIGKILL)
    printed = (tmp_path / "output").read_text()
    assert code == 0, printed
    same = ("step", "loss", "batch_hash", "grad_norm")
    assert [[m[k] for k in same] for m in steps(run)] == [[m[k] for k in same] for m in steps(tmp_path / "whole")]
    record = json.loads((run / RECORD).read_text())
    assert (record["launches"], record["restarts"]) == (3, 2) and 0 < record["ettr"] < 1
    entries = [json.loads(text) for text in (run / JOURNAL).read_text().splitlines()]
    assert [entry["exit_code"] for entry in entries if "ended" in entry] == [-9, -9, 0]
    assert "3 launches, 2 restarts" in printed and "effective training time ratio" in printed
