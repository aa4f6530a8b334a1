"""The processes around a rank: its launchers and the other ranks of its machine."""

from __future__ import annotations

import os
import signal
from functools import lru_cache
from pathlib import Path

import psutil


@lru_cache(maxsize=1)
def launchers() -> list[psutil.Process]:
    """The processes that this rank must not outlive: its parent, and DeepSpeed's runner above DeepSpeed's `launch`.

    As they are at the first call. Signals to the runner don't reach the ranks: it ends, and `launch` and the ranks go on.
    """
    try:
        parent = psutil.Process().parent()
        if parent is None or parent.pid == 1:  # nothing to outlive, or a container's first process
            return []
        runner = parent.parent() if "deepspeed.launcher.launch" in parent.cmdline() else None
        return [parent] if runner is None or runner.pid == 1 else [parent, runner]
    except psutil.Error:
        return []


def other_ranks() -> dict[str, psutil.Process]:
    """{rank: process} of the other ranks that this rank's launcher started on this machine."""
    found = {}
    try:
        for process in psutil.Process().parent().children():
            rank = process.environ().get("RANK")
            if rank is not None and process.pid != os.getpid():
                found[rank] = process
    except (psutil.Error, AttributeError):  # no parent, or one of another user
        return {}
    return found


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and that nobody has waited for doesn't."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def death_of(process: psutil.Process) -> str | None:
    """How a process ended, in words; None while it runs."""
    if alive(process):
        return None
    status = _status_of_zombie(process.pid)
    if status is None:  # its parent has taken note of it already, or this is no Linux
        return "has died"
    number = status & 0x7F
    if not number:
        return f"ended with exit code {status >> 8}"
    by = f"was killed by {signal.Signals(number).name}"
    if number == signal.SIGKILL:
        by += ", as the system does when memory runs out (`dmesg` says so then: lower batch.micro_batch_size)"
    return by


def _status_of_zombie(pid: int) -> int | None:
    """As `wait` would return it: the last field of /proc/PID/stat, see proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[-1]) if fields[0] == "Z" else None
