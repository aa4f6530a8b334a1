"""Data sets that come with dsclip, by name: functions that give their folder and write it on first use.

`dsclip/__init__.py` fills in who writes them, so that reading a name needs nothing of how a set is made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

FOLDERS: dict[str, Callable[[], Path]] = {}


def embedded_folder(name: str) -> Path | None:
    """The folder of an embedded set; None for a name that isn't one."""
    write = FOLDERS.get(name)
    return None if write is None else write()
