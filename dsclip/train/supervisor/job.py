"""One launch of a command: started as a tree of processes of which none outlives it."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import psutil

from dsclip.train.processes import alive

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
POLL_S = 0.2


class Job:
    """A command in a session of its own. What its processes start belongs to this process when they end (Linux)."""

    def __init__(self, command: Sequence[str]):
        """Raises OSError when there is no such program."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._process = subprocess.Popen(command, start_new_session=True)
        self._told: set[int] = set()

    def wait(self, asked_to_stop: Callable[[], bool], grace_s: float) -> int:
        """The command's exit code, when no process of it is left.

        When it is asked to stop, or the command ends before its ranks, those get SIGTERM, which they save at, and which a
        rank that is only starting ends at. What is left after `grace_s` seconds is killed.
        """
        ending_since: float | None = None
        while True:
            code = self._process.poll()
            left = self._left()
            if code is not None and not left:
                return code
            if code is not None or asked_to_stop():
                ending_since = ending_since or time.monotonic()
                self._tell(left)
                if time.monotonic() - ending_since > grace_s:
                    for process in left:
                        _signal(process, signal.SIGKILL)
            time.sleep(POLL_S)

    def _left(self) -> list[psutil.Process]:
        """The running processes of the launch; those that have ended and are this process's children are reaped."""
        children = psutil.Process().children(recursive=True)
        others = [p for p in children if p.pid != self._process.pid]
        _, running = psutil.wait_procs(others, timeout=0)
        found: list[psutil.Process] = [p for p in running if alive(p)]
        if self._process.poll() is None:
            found.append(psutil.Process(self._process.pid))
        return found

    def _tell(self, left: list[psutil.Process]) -> None:
        """SIGTERM to every rank, once; while there are none, to all of the launch, so that none comes."""
        for process in [p for p in left if _is_rank(p)] or left:
            if process.pid not in self._told:
                self._told.add(process.pid)
                _signal(process, signal.SIGTERM)


def _is_rank(process: psutil.Process) -> bool:
    """Launchers give RANK to ranks alone; a rank's own processes inherit it, and mind no signal."""
    try:
        return "RANK" in process.environ()
    except psutil.Error:
        return False


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
