"""Jobs of two ranks, of which one is slow or stands still."""

import re
import signal
import socket

from tests.distributed.launch import SMALL, WORKERS, deepspeed_with_a_signal, steps, warm

ON = [*SMALL, "train.save_every=null", "eval.every_steps=null", "train.name=run"]
SLEEP_S = 0.4  # much longer than a step's own work, also where other tests take the cores


def test_a_job_with_a_stopped_rank_says_where_it_is_and_ends(demo, tmp_path):
    options = [*ON, "train.steps=5000", f"train.output={tmp_path}", "train.hang_timeout=0.15"]
    ended = deepspeed_with_a_signal(
        *options, to="rank 1", number=signal.SIGSTOP, once=tmp_path / "run" / "metrics.jsonl"
    )
    assert ended.returncode not in (0, 2, 3, 75), ended.stdout  # the supervisor starts it again
    found = re.search(r"rank 0 on (\S+) \(process \d+\) hangs: step (\d+), computing, or waiting for other ranks, without "
                      r"progress for (\d+) s", ended.stdout)  # fmt: skip
    assert found, ended.stdout
    host, step, seconds = found.groups()
    logged = steps(tmp_path / "run")[-1]["step"]  # a logged step is written when the next one is queued
    assert host == socket.gethostname() and int(step) - logged in (1, 2) and seconds == "9"
    assert re.search(r'File ".*loop.py", line \d+ in train\n', ended.stdout), "no stack of the thread that trains"
    assert re.search(
        r"rank 1 \(process \d+\) is stopped, as by SIGSTOP, and the others wait for it: killed", ended.stdout
    )
    assert "Traceback" not in ended.stdout


def test_a_slow_rank_is_named_and_one_whose_data_never_comes_ends_the_job(demo, tmp_path):
    options = [*ON, "train.steps=5000", f"train.output={tmp_path}", "train.log_every=17", "train.hang_timeout=0.15"]
    options += ["batch.global_batch_size=8", "model.vision_layers=1"]
    done = warm(WORKERS / "straggler_worker.py", SLEEP_S, 54, *options, ranks=2)
    assert done.returncode == 4, done.stdout

    named = re.findall(r"step (\d+): rank (\d) on (\S+) is slow: ([\d.]+) s of its own work", done.stdout)
    assert [found[:3] for found in named] == [("51", "1", socket.gethostname())], done.stdout
    last = steps(tmp_path / "run")[-1]
    assert (last["step"], last["slow_rank"], last["slow_host"]) == (51, 1, socket.gethostname())
    assert last["slow_seconds"] >= SLEEP_S and last["slow_seconds"] > last["slow_median_seconds"]
    assert last["own_seconds_slowest"] >= SLEEP_S and last["own_seconds_slowest"] > last["own_seconds"]

    where = re.findall(r"rank (\d) on \S+ \(process \d+\) hangs: step (\d+), (.*), without progress", done.stdout)
    assert sorted(where) == [("0", "54", "computing, or waiting for other ranks"), ("1", "54", "waiting for its data")]
    assert re.search(r'straggler_worker.py", line \d+ in slowly\n', done.stdout) and "failed" not in done.stdout
