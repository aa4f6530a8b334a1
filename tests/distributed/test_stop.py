"""A whole job that is signalled, under the real launcher: saved, and no process of it left."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsclip.checkpoint.manifest import verify
from tests.distributed.launch import REPOSITORY, SMALL, deepspeed_with_a_signal, free_port, start


@pytest.mark.parametrize("to, code", [("runner", -signal.SIGTERM), ("launch", 1), ("rank 1", 75)])
def test_a_signal_to_the_launcher_or_a_rank_ends_the_job_saved_and_leaves_no_process(demo, tmp_path, to, code):
    options = [
        *SMALL,
        "train.steps=5000",
        "data.workers=2",
        f"train.output={tmp_path}",
        "train.name=stopped",
        "train.save_every=null",
        "eval.every_steps=null",
    ]
    run = tmp_path / "stopped"
    ended = deepspeed_with_a_signal(*options, to=to, once=run / "metrics.jsonl")
    assert ended.returncode == code, ended.stdout
    assert "Traceback" not in ended.stdout
    [saved] = (run / "checkpoints").iterdir()
    step = verify(saved)["step"]
    assert ended.stdout.count(f"after step {step} of 5000, which is saved in {saved}. Go on with the same command") == 1


def test_when_a_rank_dies_the_others_end_and_say_which_and_of_what(demo, tmp_path):
    options = [*SMALL, "train.steps=5000", f"train.output={tmp_path}", "train.name=run", "eval.every_steps=null"]
    ended = deepspeed_with_a_signal(
        *options, to="rank 1", number=signal.SIGKILL, once=tmp_path / "run" / "metrics.jsonl"
    )
    assert ended.returncode != 0 and "Traceback" not in ended.stdout, ended.stdout
    assert re.search(
        r"dsclip: rank 1 \(process \d+\) (was killed by SIGKILL, as the system|has died)", ended.stdout
    ), (  # fmt: skip
        ended.stdout
    )


@pytest.mark.parametrize("number, while_it", [(signal.SIGUSR1, "imports"), (signal.SIGTERM, "waits for rank 1")])
def test_a_signal_before_the_first_step_ends_a_rank_with_the_code_for_again(demo, tmp_path, number, while_it):
    port = free_port()
    job = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "launchers/train.py", *SMALL, f"train.output={tmp_path}"]
    process = start(command, stdout=subprocess.PIPE, **job)
    try:
        until(lambda: listens(port) if "waits" in while_it else catches(process.pid, number), process)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert f"rank 0 was stopped by {number.name} before its first step" in said and "Traceback" not in said


def until(holds, process, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not holds():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=5)[0]
        time.sleep(0.05)


def listens(port: int) -> bool:
    """Whether rank 0's store is there: it waits for the other ranks then, in a call that no Python handler interrupts."""
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, see proc(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


def test_a_signal_to_a_fork_is_none_to_its_rank():
    code = """
import os, signal, time
from dsclip.train.early_stop import end_on_signals
end_on_signals()
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
os.kill(child, signal.SIGTERM)
print("child", -os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
time.sleep(0.2)
print("rank goes on", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (75, "child -15\nrank goes on\n"), done.stderr
