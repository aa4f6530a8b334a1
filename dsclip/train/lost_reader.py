"""A run goes on when nobody reads what it prints any more: its terminal, ssh connection or `tee` may end before it does."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ESTALE)  # a pipe's reader, a terminal, a file of a mount


def outlive_readers() -> None:
    """From now on lines for a reader that is gone are dropped: metrics.jsonl and TensorBoard have the numbers all the same."""
    sys.stdout, sys.stderr = _Outliving(sys.stdout), _Outliving(sys.stderr)


class _Outliving:
    """A text stream that writes to /dev/null once writing fails because of its reader."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # also for what isn't Python's; what is buffered goes there
        os.close(nowhere)
