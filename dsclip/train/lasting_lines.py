"""Lines of a log that outlast a full disk: those without room wait, and are written when there is some."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


class LastingLines:
    """Appends to a file. What can't be written is kept and tried again with the next line; `say` is told when that begins and ends.

    A log is not worth a run: training goes on meanwhile.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        """Raises OSError when the file can't be opened."""
        self._path, self._say = path, say
        self._file = path.open("ab", buffering=0)
        self._left = b""
        self._waiting = False

    def write(self, line: str) -> None:
        """A line, with its end."""
        self._left += line.encode()
        try:
            while self._left:
                self._left = self._left[self._file.write(self._left) or 0 :]
        except OSError as error:
            if not self._waiting:
                reason = os.strerror(error.errno or 0)
                self._say(
                    f"{self._path} can't be written ({reason}): its lines wait in memory, and the run goes on. Make room there"
                )
            self._waiting = True
            return
        if self._waiting:
            self._say(f"{self._path} is written again, and nothing of it is missing")
        self._waiting = False

    def close(self) -> None:
        """Tries once more, and says what is lost."""
        if self._left:
            self.write("")
        if self._left:
            lines = self._left.decode().count("\n")
            self._say(f"{self._path} had no room to the end: its last {lines} lines are lost")
        self._file.close()
