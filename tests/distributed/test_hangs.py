"""Jobs of two ranks, of which one is slow or stands still."""

import json
import re
import signal
import socket
import sys

import psutil

from dsclip.train.supervisor.journal import JOURNAL, last_step
from tests.distributed.launch import (
    LAUNCHER_PATH,
    SMALL,
    WORKERS,
    rank_process,
    start,
    steps,
    under_deepspeed,
    wait_for,
    warm,
)

ON = [*SMALL, "train.save_every=null", "eval.every_steps=null", "train.name=run"]
NOTHING_AT_THE_END = [
    "train.export_hf=false", "eval.zeroshot_shards=null", "eval.retrieval_shards=null", "eval.hard_negatives_shards=null",
]  # fmt: skip
SLEEP_S = 0.4  # much longer than a step's own work, also where other tests take the cores


def test_a_supervised_job_with_a_stopped_rank_says_where_it_is_and_is_started_again_to_its_end(demo, tmp_path):
    """As `supervise.py -- deepspeed launchers/train.py`, of which rank 1 is stopped once, after step 12."""
    options = [*ON, "train.steps=30", f"train.output={tmp_path}", "train.save_every=10", "train.hang_timeout=0.15"]
    options += ["batch.global_batch_size=8", "model.vision_layers=1", *NOTHING_AT_THE_END]
    run = tmp_path / "run"
    command = [sys.executable, "launchers/supervise.py", "--", *under_deepspeed(options, 2, "zero3_bf16")]
    with (tmp_path / "output").open("w") as output:
        supervisor = start(command, stdout=output, PATH=LAUNCHER_PATH)
        try:
            wait_for(lambda: last_step(run) >= 1, supervisor)
            victim = rank_process(supervisor.pid, 1)  # looked up early: that takes as long as some steps
            wait_for(lambda: last_step(run) >= 12, supervisor)
            victim.send_signal(signal.SIGSTOP)
            code = supervisor.wait(timeout=600)
        finally:
            if supervisor.poll() is None:
                left = psutil.Process(supervisor.pid).children(recursive=True)
                for process in (supervisor, *left):
                    process.kill()
    printed = (tmp_path / "output").read_text()
    assert code == 0, printed
    found = re.search(r"rank 0 on (\S+) \(process \d+\) hangs: step (\d+), computing, or waiting for other ranks, without "
                      r"progress for (\d+) s", printed)  # fmt: skip
    assert found, printed
    host, step, seconds = found.groups()
    assert host == socket.gethostname() and 12 < int(step) < 20 and seconds == "9"
    assert re.search(r'File ".*loop.py", line \d+ in train\n', printed), "no stack of the thread that trains"
    assert re.search(r"rank 1 \(process \d+\) is stopped, as by SIGSTOP, and the others wait for it: killed", printed)
    assert "Traceback" not in printed and re.search(r"continued from \S+/step_00000010\n", printed)
    entries = [json.loads(text) for text in (run / JOURNAL).read_text().splitlines()]
    first, second = (entry["exit_code"] for entry in entries if "ended" in entry)
    assert first not in (0, 2, 3, 75) and second == 0
    assert [m["step"] for m in steps(run)] == list(range(1, 31))


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
