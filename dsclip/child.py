"""A run as a process of its own that is given the time to save when whoever started it is asked to stop."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dsclip.errors import RunStopped

STDERR = 2  # where runs print: standard output is for --json
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ROOT = Path(__file__).resolve().parents[1]  # where launchers/ is
# Of a run that was asked to stop by others; launchers that turn these into 1 are told by the signal that came here.
STOPPED = {RunStopped.exit_code, 130, 143, -signal.SIGINT, -signal.SIGTERM}


def run_training(launch: Sequence[str], ds_config: str, config: str, overrides: Sequence[str]) -> tuple[int, bool]:
    """(exit code, whether it was asked to stop) of `launchers/train.py`, begun or continued by `launch` from the checkout.

    Paths are absolute, or of the checkout. SIGINT and SIGTERM are passed on, and its end is waited for: a signal to this process alone would
    leave a run behind that trains on and holds its folder's lock.
    """
    command = [
        *launch,
        "launchers/train.py",
        "--ds_config",
        ds_config,
        "--config",
        config,
        "--resume",
        "auto",
        *overrides,
    ]
    asked = False
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if process is not None and number != signal.SIGINT:  # a terminal's Ctrl+C reaches the whole group by itself
            process.send_signal(number)

    handled = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, pass_on) for number in handled}
    try:
        process = subprocess.Popen(command, cwd=ROOT, stdout=STDERR)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, asked or code in STOPPED
