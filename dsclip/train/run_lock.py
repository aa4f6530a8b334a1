"""One run at a time in a folder: `run.lock`, created exclusively, names the host and process that hold it.

Exclusive creation works on local disks and over NFS, and needs no lock daemon. On the same machine a holder is alive when its
process is; elsewhere it is when it touched the file lately, which a thread does all the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TypedDict

from dsclip.errors import UserError

LOCK = "run.lock"
HEARTBEAT_S = 15.0
# Beyond the minute for which NFS clients may show an old time stamp.
STALE_AFTER_S = 180.0
WRITING_S = 5.0  # for which a lock may be empty: its holder has created and not yet written it


class Holder(TypedDict, total=False):
    """Who holds a lock. A lock that a kill left empty, or one of another version, has some of it only."""

    host: str
    pid: int
    started: str  # ISO 8601, UTC
    machine: list[str | None]
    process: str | None  # when the process began
    id: str


class RunLock:
    """The lock of a run's folder, held from `take` until `release`. After a SIGKILL it stays, and is found stale."""

    def __init__(self, path: Path, identity: Holder, created: bool):
        self._path, self._identity, self._created = path, identity, created
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()

    @staticmethod
    def take(run_dir: Path, say: Callable[[str], None], stale_after_s: float = STALE_AFTER_S) -> RunLock:
        """Creates the folder if need be and locks it; `say` tells what is waited for or taken over.

        Raises UserError, with who holds it, when another run is at work here.
        """
        path = run_dir / LOCK
        created = not run_dir.exists()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            identity = _this_process()
            while not _create(path, identity):
                holder, seen = _read(path)
                if holder is not None:
                    _refuse_a_living(path, holder, seen, say, stale_after_s)
                    _remove(path, holder, say)
        except OSError as error:
            raise UserError(
                f"{run_dir} can't be written to ({error}); choose another place with train.output=DIR"
            ) from error
        return RunLock(path, identity, created)

    def held(self) -> bool:
        """Whether the lock is still this run's; another may have taken it over while this one was stopped."""
        try:
            holder, _ = _read(self._path)
        except OSError:  # a file server that is away shows no other holder
            return True
        return holder == self._identity

    def release(self) -> None:
        """Gives the folder free, and removes it when it was created for nothing."""
        self._ended.set()
        if self.held():
            with contextlib.suppress(OSError):
                self._path.unlink()
                if self._created:
                    self._path.parent.rmdir()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            if not self.held():
                return
            with contextlib.suppress(OSError):  # a file server that is away for a while
                os.utime(self._path)


def _create(path: Path, identity: Holder) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with open(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(identity))
        file.flush()
        os.fsync(file.fileno())
    return True


def _read(path: Path) -> tuple[Holder | None, float]:
    """(the holder, the file's time stamp); None when the lock is gone again. A lock without content has no holder's fields."""
    end = time.monotonic() + WRITING_S
    while True:
        try:
            stamp, text = path.stat().st_mtime, path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None, 0.0
        with contextlib.suppress(ValueError):
            holder: Holder = json.loads(text)
            if isinstance(holder, dict):
                return holder, stamp
        if time.monotonic() > end:
            return {}, stamp
        time.sleep(0.1)


def _refuse_a_living(path: Path, holder: Holder, seen: float, say: Callable[[str], None], stale_after_s: float) -> None:
    """Returns when the holder is surely gone."""
    who = f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')}"
    if holder.get("machine") == _machine():
        if not _is_alive(holder):
            return
        raise UserError(
            f"another run is at work in {path.parent}: {who}. Wait for it, stop it, or choose another folder with train.name=NAME."
        )
    end = time.monotonic() + stale_after_s - (_now_by(path) - seen)
    if time.monotonic() < end:
        say(f"{path} is held by {who}, which can't be seen from here; waiting for a sign of life")
    while time.monotonic() < end:
        time.sleep(min(1.0, stale_after_s / 10))
        try:
            if path.stat().st_mtime == seen:
                continue
        except FileNotFoundError:
            return
        raise UserError(
            f"another run is at work in {path.parent}: {who}. Wait for it or choose another folder with train.name=NAME; if you "
            f"know that it has ended, remove {path}."
        )


def _remove(path: Path, holder: Holder, say: Callable[[str], None]) -> None:
    """Takes a stale lock away: renamed first, because another run may do the same at this moment."""
    aside = path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    taken, _ = _read(aside)
    if taken != holder:  # it was a new run's lock by then
        with contextlib.suppress(OSError):
            os.link(aside, path)
        aside.unlink()
        return
    aside.unlink()
    say(
        f"took over {path.parent} from process {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')}, "
        "which ended without giving it free"
    )


def _now_by(path: Path) -> float:
    """The time by the clock of the file server, which also stamps the lock."""
    probe = path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _this_process() -> Holder:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(),
        "process": _process(os.getpid()),
        "id": uuid.uuid4().hex,
    }


def _machine() -> list[str | None]:
    """What must be equal for process numbers to mean the same: the host, its boot, and the container."""
    boot = namespace = None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return [socket.gethostname(), boot, namespace]


def _process(pid: int) -> str | None:
    """When a process began, so that a number that was given again isn't taken for it; None for one that ended.

    In clock ticks since the boot: psutil adds the time of the boot, which moves when the clock is set.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _is_alive(holder: Holder) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if Path("/proc/self/stat").exists():
        return _process(pid) is not None and _process(pid) == holder.get("process")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
