"""The files of a rank's part of a checkpoint, written at once; and what went wrong with them in words that all ranks can be told."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar, cast

import torch
import torch.utils.serialization
from torch import Tensor

from dsclip.files import on_disk
from dsclip.saving.hashed_file import PAGE, FileEntry, HashedFile, write_hashed

T = TypeVar("T")
SAFETENSORS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


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
        with as_checkpoints_are_saved():
            self._write(path, lambda file: torch.save(content, cast(IO[bytes], file)))

    def tensors(self, tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        """See `Files`."""
        self.attempt(path, lambda: write_tensors(tensors, path, metadata))

    def text(self, content: str, path: Path) -> None:
        """See `Files`."""
        self._write(path, lambda file: file.write(content.encode()))

    def written(self) -> Written:
        """What became of all files, once they are on the disk."""
        for path in self._entries:  # only now: the disk is busy with all of them, and none waits for another's hash
            self._attempt(Path(path), partial(on_disk, Path(path)))
        return Written(self._entries, self._problem, self._seconds)

    def attempt(self, path: Path, write: Callable[[], FileEntry]) -> None:
        """write() makes the file and says what is in it; its problem is noted."""
        if (entry := self._attempt(path, write)) is not None:
            self._entries[str(path)] = entry

    def _attempt(self, path: Path, work: Callable[[], T]) -> T | None:
        if self._problem is not None:
            return None
        started = time.monotonic()
        try:
            return work()
        except OSError as error:
            self._problem = problem_of(error, path)
            return None
        finally:
            self._seconds += time.monotonic() - started

    def _write(self, path: Path, content: Callable[[HashedFile], object]) -> None:
        self.attempt(path, lambda: write_hashed(path, content))


@contextmanager
def as_checkpoints_are_saved() -> Iterator[None]:
    """Within it `torch.save` begins each tensor at a page of the file, and writes no CRC-32 of it.

    A page: for `HashedFile`. The CRC: the manifest has SHA-256, torch never compares the CRC, and it is a third pass over the bytes, which
    nothing goes on beside.
    """
    settings = torch.utils.serialization.config.save
    before = settings.compute_crc32, settings.storage_alignment
    settings.compute_crc32, settings.storage_alignment = False, PAGE
    try:
        yield
    finally:
        settings.compute_crc32, settings.storage_alignment = before


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None) -> FileEntry:
    """A safetensors file: the header's length as uint64, little-endian; the header in JSON; the tensors. Raises OSError.

    The library's writer would take another process's memory once more, and its file would have to be read again for the hash.
    """
    # Each begins at a multiple of its numbers' size then.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in names:
        x = tensors[name]
        start, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": SAFETENSORS[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def content(file: HashedFile) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            x = tensors[name].detach().cpu().contiguous().view(-1)
            if len(x):
                file.write(x.view(torch.uint8).numpy().data)

    return write_hashed(path, content)


def problem_of(error: OSError, path: Path) -> Problem:
    """What a write raised, in words that name the file."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return Problem(f"{path} could not be written ({reason})", error.errno in NO_ROOM)
