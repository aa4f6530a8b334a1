"""Signals that ask a run to stop: all ranks save after the same step, and the run ends with a code that says "start me again"."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

import psutil

from dsclip.distributed import Collectives
from dsclip.errors import RunStopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher passes on what its ranks were sent too: a signal so soon after the first is no second request.
ECHO_S = 5.0
LAUNCHER_GONE_S = 600.0  # a rank that can't finish its step then ends without it
POLL_S = 1.0


class StopSignals:
    """While entered, the first SIGTERM, SIGINT or SIGUSR1 is a note that `agreed` shows to all ranks; a later one ends
    the process at once. A launcher that is gone counts as a signal: its ranks must not train on without it."""

    def __init__(self, group: Collectives):
        self._group = group
        self._asked: str | None = None
        self._asked_at = 0.0
        self._over = threading.Event()

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        threading.Thread(target=self._watch, args=(launchers(),), daemon=True, name="dsclip launcher watch").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        # A rank that stops is still saving, while its launcher may send it what another rank was sent.
        if kind is not RunStopped:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def agreed(self) -> str | None:
        """Why every rank stops after this step, the same on all of them; None when they go on. Collective."""
        return self._group.decide(self._asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            name = signal.Signals(number).name
            self._ask(name if self._group.world_size == 1 else f"{name} to rank {self._group.rank}")
        elif time.monotonic() - self._asked_at > ECHO_S:
            os.write(
                sys.stderr.fileno(), b"dsclip: a second signal: ended at once, without a checkpoint of this step\n"
            )
            os._exit(128 + number)

    def _ask(self, why: str) -> None:
        self._asked_at, self._asked = time.monotonic(), why

    def _watch(self, watched: list[psutil.Process]) -> None:
        """Runs in a thread of its own: a rank that hangs in a collective would never look."""
        while not self._over.wait(POLL_S):
            gone = next((p for p in watched if not alive(p)), None)
            if gone is None:
                continue
            if self._asked is None:
                self._ask(f"the end of its launcher, process {gone.pid}")
            if not self._over.wait(LAUNCHER_GONE_S):
                os.write(
                    sys.stderr.fileno(),
                    b"dsclip: the launcher is gone and this step doesn't end: ended without a checkpoint\n",
                )
                os._exit(1)


def launchers() -> list[psutil.Process]:
    """The processes that this rank must not outlive: its parent, and DeepSpeed's runner above DeepSpeed's `launch`.

    Signals to the runner don't reach the ranks: it ends by itself, and `launch` and the ranks go on.
    """
    try:
        parent = psutil.Process().parent()
        if parent is None or parent.pid == 1:  # nothing to outlive, or a container's first process
            return []
        runner = parent.parent() if "deepspeed.launcher.launch" in parent.cmdline() else None
        return [parent] if runner is None or runner.pid == 1 else [parent, runner]
    except psutil.Error:
        return []


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and that nobody has waited for doesn't."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
