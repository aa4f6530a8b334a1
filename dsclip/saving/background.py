"""A rank's side of the process that writes its part of checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from typing import IO, Any

import torch

from dsclip.saving.commit import Commit, Committed
from dsclip.saving.copied import CopiedFiles
from dsclip.saving.files import Problem, Written
from dsclip.saving.shared_memory import SharedMemory, pages

PIPE_BYTES = (
    1 << 20
)  # an order must not wait until the process is done with the one before; what an unprivileged one may ask for
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def available() -> bool:
    """Whether this system has memory that processes share without a name."""
    return hasattr(os, "memfd_create")


class Background:
    """A process of its own, which no lock of Python's and no GPU ties to the training, and the memory it shares.

    size: about the bytes of this rank's part. One part at a time is copied and written. A process that died is noticed with the
    next look, and another one begins with the next part.
    """

    def __init__(self, size: int, device: torch.device):
        self._memory = SharedMemory(size, pinned=device.type == "cuda")
        self._device, self._size = device, size
        self._busy: int | None = None  # the order to write or to commit that is being obeyed
        self._written = Written({}, None, 0.0)  # the last part
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dsclip.saving.writer", str(self._memory.handle), str(os.getpid())]
        # Not forked: a copy of a process with a GPU and threads may do nothing with either.
        environment = {k: v for k, v in os.environ.items() if k != "RANK"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        # A signal that asks the job to stop reaches all its processes; the rank waits for this one then. Blocked is inherited, and
        # so holds from the beginning.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                pass_fds=[self._memory.handle], pipesize=PIPE_BYTES,
            )  # fmt: skip
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._process, self._ordered, self._read = process, 0, b""
        self._order({"allot": pages(self._size)})  # before the first part is copied, which would take longer
        return process

    def files(self) -> CopiedFiles:
        """Takes the next part; nothing may be under way."""
        if self._busy is not None:
            raise RuntimeError("a part is still being written")
        if self._process.poll() is not None:
            self._process = self._start()
        return CopiedFiles(self._memory, self._device)

    def write(self, files: CopiedFiles) -> None:
        """Begins to write what was copied."""
        jobs, self._written = files.complete(), Written({}, files.problem, 0.0)
        if files.problem is None:
            self._busy = self._order({"write": jobs})

    def commit(self, order: Commit) -> None:
        """Begins to make a checkpoint of a folder, when all that is in it has been written, by whoever it was."""
        self._busy = self._order({"commit": order})

    def committed(self, *, wait: bool) -> Committed | None:
        """What became of the commit that was begun last; None while it goes on, if nobody waits."""
        if self._busy is None:
            raise RuntimeError("no commit was begun")
        if (answer := self._answer(self._busy, wait=wait)) is None:
            return None
        self._busy = None
        return Committed(problem_in(answer), answer.get("aside", []), answer.get("seconds", 0.0))

    def remove(self, folders: list[str]) -> None:
        """Removes folders some time: large files take a while to go."""
        if folders:
            self._order({"remove": folders})

    def written(self, *, wait: bool) -> Written | None:
        """What became of the part; None while it is being written, if nobody waits."""
        if self._busy is None:
            return self._written
        answer = self._answer(self._busy, wait=wait)
        if answer is None:
            return None
        written = Written(answer.get("entries", {}), problem_in(answer), answer.get("seconds", 0.0))
        self._busy, self._written = None, written
        return self._written

    def close(self) -> None:
        """Ends the process and gives its memory back: a part that is being written is given up, folders are removed first."""
        if self._busy is not None:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._memory.close()

    def _order(self, order: dict[str, Any]) -> int:
        """The number of the order; its answer has it too."""
        self._ordered += 1
        with contextlib.suppress(BrokenPipeError):  # `_answer` says of what the process died
            print(json.dumps({"number": self._ordered, **order}), file=self._pipe(self._process.stdin), flush=True)
        return self._ordered

    def _answer(self, number: int, *, wait: bool) -> dict[str, Any] | None:
        """The answer to an order, or that the process has died; None when there is none yet and nobody waits."""
        # Not through Python's file, which would read two answers and show that one is there.
        answers = self._pipe(self._process.stdout).fileno()
        while True:
            line, ended, rest = self._read.partition(b"\n")
            if ended:
                self._read = rest
                answer: dict[str, Any] = json.loads(line)
                if answer["number"] == number:
                    return answer
                continue
            if not wait and not select.select([answers], [], [], 0)[0]:
                return None
            if not (more := os.read(answers, 1 << 16)):
                code = self._process.wait()
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return {"problem": [f"the process that writes it ({self._process.pid}) {how}"]}
            self._read += more

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        if pipe is None:
            raise RuntimeError("the process was started without pipes")
        return pipe


def problem_in(answer: dict[str, Any]) -> Problem | None:
    """As JSON holds it."""
    problem = answer.get("problem")
    return None if problem is None else Problem(*problem)
