"""Files that are hashed while they are written, and what went wrong with them in words that all ranks can be told."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypedDict, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsclip.files import on_disk, permit_as_new, sha256

PIECE = 1 << 24  # bytes written at a time; the disk begins with each at once
ALONE = 1 << 16  # so few bytes are hashed without another thread
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class FileEntry(TypedDict):
    """A file of a checkpoint: its size in bytes and the SHA-256 of its content, in hex."""

    bytes: int
    sha256: str


class Problem(NamedTuple):
    """Why a rank's part was not written. no_room: the disk is full, or a quota."""

    text: str
    no_room: bool = False


class Written(NamedTuple):
    """A rank's part: its files by their whole path, or the first problem; and the seconds that writing took."""

    entries: dict[str, FileEntry]
    problem: Problem | None
    seconds: float


class Files(Protocol):
    """Takes the files of a rank's part of a checkpoint. A file that can't be written raises nothing: other ranks wait."""

    def torch(self, content: Any, path: Path) -> None:
        """What `torch.save` writes of content."""

    def tensors(self, tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        """A safetensors file."""

    def text(self, content: str, path: Path) -> None:
        """A text in UTF-8."""


class WriteNow:
    """Writes each file before it returns, in this process. After the first problem nothing more is written."""

    def __init__(self) -> None:
        self._entries: dict[str, FileEntry] = {}
        self._problem: Problem | None = None
        self._seconds = 0.0

    def torch(self, content: Any, path: Path) -> None:
        """See `Files`."""
        self._write(path, lambda file: torch.save(content, cast(IO[bytes], file)))

    def tensors(self, tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        """See `Files`."""
        self.attempt(path, lambda: write_tensors(tensors, path, metadata))

    def text(self, content: str, path: Path) -> None:
        """See `Files`."""
        self._write(path, lambda file: file.write(content.encode()))

    def written(self) -> Written:
        """What became of all files."""
        return Written(self._entries, self._problem, self._seconds)

    def attempt(self, path: Path, write: Callable[[], FileEntry]) -> None:
        """write() makes the file, on the disk, and says what is in it; its problem is noted."""
        if self._problem is not None:
            return
        started = time.monotonic()
        try:
            self._entries[str(path)] = write()
        except (OSError, SafetensorError) as error:
            self._problem = problem_of(error, path)
        self._seconds += time.monotonic() - started

    def _write(self, path: Path, content: Callable[[HashedFile], object]) -> None:
        self.attempt(path, lambda: write_hashed(path, content))


class HashedFile:
    """A new file whose content is hashed by a thread while it is written. `torch.save` takes it for a file."""

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=0)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="dsclip-hash")
        self._digest = hashlib.sha256()
        self._bytes = 0
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
                count = self._file.write(view[:PIECE]) or 0
                # Begins to write the pages out, and drops those that are: nobody reads them soon.
                if hasattr(os, "posix_fadvise"):  # macOS hasn't
                    os.posix_fadvise(self._file.fileno(), self._bytes, count, os.POSIX_FADV_DONTNEED)
                self._bytes += count
                view = view[count:]
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Nothing is held back."""

    def finish(self) -> FileEntry:
        """Returns when the content is on the disk."""
        os.fsync(self._file.fileno())
        if (size := os.fstat(self._file.fileno()).st_size) != self._bytes:
            raise OSError(errno.EIO, f"{size} bytes are there of {self._bytes} that were written")
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Also after a problem."""
        self._hasher.shutdown()
        self._file.close()


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


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None) -> FileEntry:
    """A safetensors file, which its library writes. Raises SafetensorError or OSError."""
    save_file(dict(tensors), str(path), metadata=metadata)
    permit_as_new(path)
    on_disk(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def problem_of(error: Exception, path: Path) -> Problem:
    """What a write raised, in words that name the file."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (said := re.search(r"os error (\d+)", str(error))):  # as safetensors says it
        number = int(said[1])
    reason = os.strerror(number) if number else str(error)
    return Problem(f"{path} could not be written ({reason})", number in NO_ROOM)
