"""A file that is hashed while it is written, past the system's cache where its memory allows that."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

import numpy as np

PAGE = 4096  # what disks and memory must be divided by for a write past the cache; no device asks for more
PIECE = 1 << 24  # bytes written at a time; the disk begins with each at once
ALONE = 1 << 16  # so few bytes are hashed without another thread, and go through the cache


class FileEntry(TypedDict):
    """A file of a checkpoint: its size in bytes and the SHA-256 of its content, in hex."""

    bytes: int
    sha256: str


class HashedFile:
    """A new file whose content is hashed by a thread while it is written. `torch.save` takes it for a file."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._direct: int | None = None  # the same file, past the cache
        with contextlib.suppress(OSError, AttributeError):  # a file system without it, or a system
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="dsclip-hash")
        self._digest = hashlib.sha256()
        self._bytes = 0
        self.direct_bytes = 0
        self.error: OSError | None = None  # torch's writer hides what a write raised

    def write(self, content: bytes | memoryview) -> int:
        """All of it, however long; returns the bytes."""
        view = memoryview(content).cast("B")
        if len(view) <= ALONE:
            self._digest.update(view)
            self._put(view)
            return len(view)
        hashing = self._hasher.submit(self._digest.update, view)
        try:
            self._put(view)
        finally:
            hashing.result()  # the memory may be gone after this call
        return len(view)

    def _put(self, view: memoryview) -> None:
        try:
            while len(view):
                count = self._put_directly(view) or self._put_through_the_cache(view[:PIECE])
                self._bytes += count
                view = view[count:]
        except OSError as error:
            self.error = error
            raise

    def _put_directly(self, view: memoryview) -> int:
        """Writes whole pages of memory onto whole pages of the file; returns the bytes, 0 where that can't be.

        The cache costs more than the hash: pages are taken, filled and given back, 1.3 s of a core for 1 GB where it was measured.
        """
        if (
            self._direct is None
            or len(view) <= ALONE
            or self._bytes % PAGE
            or np.frombuffer(view, "u1").ctypes.data % PAGE
        ):
            return 0
        try:
            count = os.pwrite(self._direct, view[: min(len(view) // PAGE * PAGE, PIECE)], self._bytes)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.close(self._direct)
            self._direct = None
            return 0
        self.direct_bytes += count
        return count

    def _put_through_the_cache(self, view: memoryview) -> int:
        count = os.pwrite(self._file, view, self._bytes)
        # Begins to write the pages out, and drops those that are: nobody reads them soon.
        if len(view) > ALONE and hasattr(os, "posix_fadvise"):  # macOS hasn't
            os.posix_fadvise(self._file, self._bytes, count, os.POSIX_FADV_DONTNEED)
        return count

    def flush(self) -> None:
        """Nothing is held back."""

    def finish(self) -> FileEntry:
        """What is in it, on its way to the disk."""
        if (size := os.fstat(self._file).st_size) != self._bytes:
            raise OSError(errno.EIO, f"{size} bytes are there of {self._bytes} that were written")
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Also after a problem."""
        self._hasher.shutdown()
        os.close(self._file)
        if self._direct is not None:
            os.close(self._direct)


def write_hashed(path: Path, content: Callable[[HashedFile], object]) -> FileEntry:
    """A file that content(file) writes. Raises OSError, also where a library hid it."""
    file = HashedFile(path)
    try:
        content(file)
        return file.finish()
    except Exception as error:
        if file.error is not None and error is not file.error:
            raise file.error from error
        raise
    finally:
        file.close()
