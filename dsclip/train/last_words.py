"""What a process says that may not get to its next instruction. Imports nothing slow."""

from __future__ import annotations

import contextlib
import os
import sys


def say_last(text: str) -> None:
    """A line on standard error, past Python's buffers, which another thread may hold."""
    with contextlib.suppress(OSError):  # who read it may be gone
        os.write(sys.stderr.fileno(), f"dsclip: {text}\n".encode())
