"""Ranks forked from a process that has imported everything: a launch begins with its work instead of with its imports.

Run as a module it is that process. It reads launches from its standard input, a line of JSON each, and answers each with
the first exit code that isn't 0. Ranks find the environment that torchrun would give them; when one fails, the others
are stopped as torchrun stops them. Importing alone starts no thread, so that forking is safe.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).parent.parent.parent
# What the ranks import in the course of a run.
IMPORTED = (
    "dsclip.train.cli", "dsclip.train.loop", "dsclip.engine.contrastive", "dsclip.evaluate.cli", "dsclip.convert.cli",
    "deepspeed.ops.adam", "torch._dynamo", "torch._inductor.compile_fx", "torch.utils.tensorboard",
    "transformers.models.clip.modeling_clip", "webdataset",
)  # fmt: skip
GRACE_S = 5  # for the ranks that are stopped because another one failed
HUNG = 124


@dataclass(frozen=True)
class Launch:
    """A script on so many ranks; their two output streams go into one file."""

    script: str
    arguments: list[str]
    ranks: int
    port: int
    environment: dict[str, str]
    output: str
    timeout_s: float


class WarmRanks:
    """The process that forks ranks; it starts with the first launch and ends with this one."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, launch: Launch) -> int:
        """The exit code of a launch: 0, that of the rank that failed first, or HUNG."""
        if self._server is None or self._server.poll() is not None:
            command = [sys.executable, "-u", "-m", "tests.distributed.warm_ranks"]
            self._server = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=REPOSITORY,
                env=launch.environment,
            )
        requests, answers = self._server.stdin, self._server.stdout
        requests.write(json.dumps(asdict(launch)) + "\n")
        requests.flush()
        return int(answers.readline())


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answers every launch; returns in the forked ranks too, when their script has ended."""
    for line in requests:
        launch = Launch(**json.loads(line))
        pids = _fork_all(launch)
        if pids is None:
            return
        answers.write(f"{_wait(pids, launch.timeout_s)}\n")
        answers.flush()


def _fork_all(launch: Launch) -> list[int] | None:
    """The ranks' process ids; None in a rank whose script has ended."""
    pids: list[int] = []
    for rank in range(launch.ranks):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            _run(launch, rank)
            return None
        with contextlib.suppress(PermissionError, ProcessLookupError):  # either of the two is first
            os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def _run(launch: Launch, rank: int) -> None:
    output = os.open(launch.output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": launch.ranks, "LOCAL_WORLD_SIZE": launch.ranks}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launch.port}
    os.environ.clear()
    os.environ.update(launch.environment | {name: str(value) for name, value in given.items()})
    random.seed()  # every process has its own
    sys.argv = [launch.script, *launch.arguments]
    runpy.run_path(launch.script, run_name="__main__")


def _wait(pids: list[int], timeout_s: float) -> int:
    """The first exit code that isn't 0. Nothing of the launch is left running."""
    running, code, end = set(pids), 0, time.monotonic() + timeout_s
    try:
        while running:
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.discard(pid)
                    if status and not code:
                        code, end = abs(os.waitstatus_to_exitcode(status)), time.monotonic() + GRACE_S
                        _signal(pids[0], signal.SIGTERM)
            if running and time.monotonic() > end:
                code = code or HUNG
                break
            time.sleep(0.01)
    finally:
        _signal(pids[0], signal.SIGKILL)
        for pid in running:
            os.waitpid(pid, 0)
    return code


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def main() -> None:
    """The process that forks ranks."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage for every engine; what was imported is none
    if threading.active_count() > 1:
        raise RuntimeError(f"an import has started a thread: {threading.enumerate()}")
    serve(requests, answers)


if __name__ == "__main__":
    main()
