"""Signals that ask a run to stop: all ranks save after the same step, and the run ends with a code that says "start me again"."""

from __future__ import annotations

import itertools
import os
import select
import signal
import threading
import time
from types import TracebackType

from dsclip.distributed import STOP_SIGNALS, Collectives
from dsclip.errors import RunFailed, RunStopped
from dsclip.train.hangs import EXIT_CODE, GRACE_S, POLL_S, TELL, Heart, end_stopped, tell
from dsclip.train.last_words import say_last
from dsclip.train.processes import death_of, launchers, other_ranks

# A launcher passes on what its ranks were sent too: a signal so soon after the first is no second request.
ECHO_S = 5.0
LAUNCHER_GONE_S = 600.0  # a rank that can't finish its step then ends without it
_loops = itertools.count()  # of this process; the same on all ranks


class StopSignals:
    """While entered, the first SIGTERM, SIGINT or SIGUSR1 is a note that `agreed` shows to all ranks; a later one ends
    the process at once. A launcher that is gone counts as a signal: its ranks must not train on without it. When another
    rank of this machine is gone, this one ends: no collective would ever. So it does when the heart hasn't beaten for too
    long, after all ranks of the machine have said where they are."""

    def __init__(self, group: Collectives, heart: Heart):
        self._group, self._heart = group, heart
        self._hangs = False
        self._asked: str | None = None
        self._asked_at = 0.0
        self._over = threading.Event()
        self._subject = f"stop {next(_loops)}"  # what was said of an earlier loop of these ranks counts no more

    def __enter__(self) -> StopSignals:
        self._launchers, self._ranks = launchers(), other_ranks()
        # Python runs a handler between its own instructions: a rank that hangs in a collective would never come to it.
        self._pipe, self._pipe_end = os.pipe()
        os.set_blocking(self._pipe_end, False)
        self._before_fd = signal.set_wakeup_fd(self._pipe_end, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in (*STOP_SIGNALS, TELL)}
        threading.Thread(target=self._watch, daemon=True, name="dsclip process watch").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hangs:  # what a collective says of a rank that ended for that must not end this one first
            time.sleep(2 * GRACE_S)
        self._over.set()
        # A rank that stops is still saving, while its launcher may send it what another rank was sent.
        signal.set_wakeup_fd(-1 if kind is RunStopped else self._before_fd)
        os.close(self._pipe_end)  # which wakes the thread, and it closes the other end
        if kind is not RunStopped:
            for number, handler in self._before.items():
                signal.signal(number, handler)
        # What a collective says of a rank that is gone names nobody.
        if isinstance(error, RuntimeError) and (dead := self._dead(wait_s=2.0)):
            raise RunFailed(dead) from error

    def agreed(self) -> str | None:
        """Why every rank stops after this step, the same on all of them; None when they go on. Collective."""
        return self._group.decide(self._asked, self._subject)

    def _watch(self) -> None:
        """Runs in a thread of its own, until the loop is left."""
        while not self._over.is_set():
            if select.select([self._pipe], [], [], POLL_S)[0]:
                for number in os.read(self._pipe, 64):
                    self._note(number)
            elif self._heart.polled():
                tell(self._ranks)
                self._end_hang()
            if dead := self._dead():
                self._end(dead, 1, wait_s=2 * POLL_S)
            gone = self._launchers.gone()
            if gone is not None and self._asked is None:
                self._ask(gone)
            if gone is not None and time.monotonic() - self._asked_at > LAUNCHER_GONE_S:
                self._end("the launcher is gone and this step doesn't end: ended without a checkpoint", 1)
        os.close(self._pipe)

    def _note(self, number: int) -> None:
        if number == TELL:
            self._end_hang()
        if number not in STOP_SIGNALS:
            return
        if self._asked is None:
            name = signal.Signals(number).name
            self._ask(name if self._group.world_size == 1 else f"{name} to rank {self._group.rank}")
        elif time.monotonic() - self._asked_at > ECHO_S:
            self._end("a second signal: ended at once, without a checkpoint of this step", 128 + number)

    def _end_hang(self) -> None:
        self._hangs = True
        self._heart.report(self._group.rank)
        time.sleep(GRACE_S)
        end_stopped(self._ranks)
        os._exit(EXIT_CODE)

    def _ask(self, why: str) -> None:
        self._asked_at, self._asked = time.monotonic(), why

    def _dead(self, wait_s: float = 0) -> str | None:
        """Which other rank of this machine has died, of what, and what to do; waits so long for it."""
        until = time.monotonic() + wait_s
        while True:
            for rank, process in self._ranks.items():
                if how := death_of(process):
                    return (
                        f"rank {rank} (process {process.pid}) {how}; the other ranks can't go on. Start again with "
                        "--resume auto"
                    )
            if time.monotonic() >= until:
                return None
            time.sleep(0.05)

    def _end(self, why: str, code: int, wait_s: float = 0) -> None:
        """Ends the process, unless the loop is left within the time."""
        if not self._over.wait(wait_s):
            say_last(why)
            os._exit(code)
