"""What a rank does and since when, so that a job that hangs says where and ends."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import socket
import sys

import psutil

from dsclip.train.last_words import say_last
from dsclip.train.processes import alive

TELL = signal.SIGUSR2  # from a rank that has noticed a hang to those of its machine: say where you are, and end
EXIT_CODE = 4
POLL_S = 1.0
GRACE_S = 5.0  # for the other ranks of the machine to say where they are, before the first one ends
LONGER = 4  # times the recipe's time: compiling in the first step, saving and what evaluates between two batches


class Heart:
    """Beats with every progress of the training loop; a thread counts polls in between.

    Polls are counted, not time: a machine that sleeps, or a job that is stopped as a whole, makes none.
    minutes: without progress that are a hang, of polls every POLL_S; 0: never.
    """

    def __init__(self, minutes: float):
        self._limit = math.ceil(60 * minutes / POLL_S) if minutes else None
        self._polls, self._longer = 0, False
        self._step, self._doing = 0, "before its first step"

    def beat(self, doing: str | None = None, step: int | None = None, *, longer: bool = False) -> None:
        """Progress. doing: what begins now, None: it goes on; step: that is made or was made last; longer: it may take LONGER times the time."""
        if doing is not None:
            self._doing, self._longer = doing, longer
        if step is not None:
            self._step = step
        self._polls = 0

    def polled(self) -> bool:
        """Another poll has passed; whether there have been too many without a beat."""
        self._polls += 1
        return self._limit is not None and self._polls >= self._limit * (LONGER if self._longer else 1)

    def report(self, rank: int) -> None:
        """Where this rank is, and the stack of each of its threads, to standard error."""
        say_last(
            f"rank {rank} on {socket.gethostname()} (process {os.getpid()}) hangs: step {self._step}, {self._doing}, without progress for "
            f"{self._polls * POLL_S:.0f} s. Its threads:"
        )
        faulthandler.dump_traceback(sys.stderr.fileno(), all_threads=True)


def tell(ranks: dict[str, psutil.Process]) -> None:
    """Tells the other ranks of this machine to report too."""
    for process in ranks.values():
        try:
            process.send_signal(TELL)
        except psutil.Error:  # it has ended
            continue


def end_stopped(ranks: dict[str, psutil.Process]) -> None:
    """Names and kills the ranks of this machine that were stopped (SIGSTOP): they can end themselves by nothing."""
    for rank, process in ranks.items():
        try:
            if alive(process) and process.status() == psutil.STATUS_STOPPED:
                say_last(
                    f"rank {rank} (process {process.pid}) is stopped, as by SIGSTOP, and the others wait for it: killed"
                )
                process.kill()
        except psutil.Error:  # it has ended meanwhile
            continue
