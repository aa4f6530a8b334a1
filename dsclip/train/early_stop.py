"""Signals outside of the training loop: a rank that has nothing new to save ends at once, with the code that says "start me again".

Imports nothing slow: it is called before what takes seconds to import.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from dsclip.errors import RunStopped
from dsclip.train.last_words import say_last

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C stays Python's


def end_on_signals() -> None:
    """From now on SIGTERM and SIGUSR1 end this process with exit code 75, also while it waits for other ranks.

    While it trains, `StopSignals` takes over. Processes that are forked from this one have the signals' default.
    """
    pipe, pipe_end = os.pipe()
    os.set_blocking(pipe_end, False)
    # A thread reads what arrives: Python runs a handler between its own instructions, and never while it waits for other ranks.
    signal.set_wakeup_fd(pipe_end, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _noted)
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_forget)
    threading.Thread(target=_watch, args=(pipe,), daemon=True, name="dsclip early stop").start()


def _noted(number: int, frame: FrameType | None) -> None:
    """The thread has it."""


def _hold() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _forget() -> None:
    """In a fork, which has the same pipe: a signal to a data worker is none to its rank. It is held back until here."""
    if ours := [number for number in SIGNALS if signal.getsignal(number) is _noted]:
        signal.set_wakeup_fd(-1)
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
    _release()


def _watch(pipe: int) -> None:
    while True:
        for number in os.read(pipe, 64):
            if number in SIGNALS:
                rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
                say_last(
                    f"rank {rank} was stopped by {signal.Signals(number).name} before its first step, or after its last, which is saved. "
                    "Go on with the same command and --resume auto"
                )
                os._exit(RunStopped.exit_code)
