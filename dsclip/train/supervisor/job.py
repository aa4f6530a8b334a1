"""One launch of a command: started as a tree of processes of which none outlives it."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import psutil

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
POLL_S = 0.2


class Job:
    """A command in a session of its own. What its processes start belongs to this process when they end (Linux)."""

    def __init__(self, command: Sequence[str]):
        """Raises OSError when there is no such program."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._process = subprocess.Popen(command, start_new_session=True)

    def wait(self, asked_to_stop: Callable[[], bool], grace_s: float) -> int:
        """The command's exit code, when no process of it is left.

        When it is asked to stop, the ranks get SIGTERM, which they save at. Ranks that are left when the command has ended,
        or that don't stop, are killed after `grace_s` seconds: they may be saving.
        """
        told_at: float | None = None
        while (code := self._process.poll()) is None:
            if told_at is None and asked_to_stop():
                self._tell()
                told_at = time.monotonic()
            if told_at is not None and time.monotonic() - told_at > grace_s:
                break
            time.sleep(POLL_S)
        _, left = psutil.wait_procs(_descendants(), timeout=0 if code is None else grace_s)
        for process in left:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(left, timeout=60)
        return self._process.wait()

    def _tell(self) -> None:
        """SIGTERM to the ranks; to the command itself while there are none."""
        ranks = [p for p in _descendants() if _is_rank(p)]
        for process in ranks or [psutil.Process(self._process.pid)]:
            _signal(process, signal.SIGTERM)


def _descendants() -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


def _is_rank(process: psutil.Process) -> bool:
    """Launchers give RANK to ranks alone; a rank's own processes inherit it, and mind no signal."""
    try:
        return "RANK" in process.environ()
    except psutil.Error:
        return False


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass
