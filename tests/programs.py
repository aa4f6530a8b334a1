"""Runs a launcher or tool of the checkout as `__main__` in this process: a new one would spend seconds on imports alone."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from dsclip.train.early_stop import SIGNALS

ROOT = Path(__file__).parent.parent


def run_program(program: str, *arguments) -> subprocess.CompletedProcess:
    """What the program printed and its exit code; from the checkout's root, as the documents say.

    Not for the errors of `launchers/`: those end the process without a teardown that could wait for other ranks.
    """
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    argv = [program, *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _own_signals()
    ):  # fmt: skip
        os.chdir(ROOT)
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            os.chdir(before)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _own_signals():
    """What a launcher does with signals ends with it."""
    before, wakeup = {n: signal.getsignal(n) for n in SIGNALS}, signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
