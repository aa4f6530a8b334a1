"""The processes around a rank: its launchers and the other ranks of its machine."""

from __future__ import annotations

import os
import signal
from functools import lru_cache
from pathlib import Path

import psutil

from dsclip.distributed import slurm_ranks
from dsclip.errors import UserError

JOB = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")  # ranks of one job have these in common


class Launchers:
    """The processes that this rank must not outlive: its parent, and DeepSpeed's runner above DeepSpeed's `launch`.

    Signals to the runner don't reach the ranks: it ends, and `launch` and the ranks go on. A rank that no launcher started
    has none: its shell may go.
    """

    def __init__(self) -> None:
        self._watched: list[psutil.Process] = []
        self._lost = False  # the runner was gone before this rank began
        parent = _parent(psutil.Process()) if "RANK" in os.environ else None
        if parent is None or parent.pid == 1:  # pid 1: a container's first process
            return
        self._watched.append(parent)
        if "deepspeed.launcher.launch" in _command_line(parent) and (runner := _parent(parent)):
            line = _command_line(runner)
            if any(Path(word).name == "deepspeed" for word in line[:2]) or "deepspeed.launcher" in " ".join(line):
                self._watched.append(runner)
            else:  # who takes the place of a parent that has died: the first process, or a supervisor
                self._lost = runner.pid == 1 or any(word.endswith("supervise.py") for word in line[:3])

    def gone(self) -> str | None:
        """What has ended, in words; None while all are there."""
        if self._lost:
            return "the end of its launcher"
        return next((f"the end of its launcher, process {p.pid}" for p in self._watched if not alive(p)), None)


@lru_cache(maxsize=1)
def launchers() -> Launchers:
    """This rank's launchers as they are at the first call."""
    return Launchers()


def other_ranks() -> dict[str, psutil.Process]:
    """{rank: process} of the other ranks of this job that this rank's launcher started on this machine."""
    parent = _parent(psutil.Process())
    found = {}
    for process in [] if parent is None else parent.children():
        try:
            theirs = process.environ()
            theirs |= slurm_ranks(theirs)  # what a process sets itself isn't seen from outside
        except (psutil.Error, UserError):  # ended, or of another user; no rank of this job
            continue
        if "RANK" in theirs and process.pid != os.getpid() and all(theirs.get(k) == os.environ.get(k) for k in JOB):
            found[theirs["RANK"]] = process
    return found


def _parent(process: psutil.Process) -> psutil.Process | None:
    try:
        return process.parent()
    except psutil.Error:
        return None


def _command_line(process: psutil.Process) -> list[str]:
    try:
        line: list[str] = process.cmdline()
        return line
    except psutil.Error:
        return []


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
