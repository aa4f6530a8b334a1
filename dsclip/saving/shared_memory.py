"""Memory of the host that two processes share, and that no file system shows: when both are gone, so is it."""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from dataclasses import dataclass

import torch
from torch import UntypedStorage

from dsclip.saving.hashed_file import PAGE

ALIGNMENT = PAGE  # of tensors' numbers, so that they can be written past the system's cache
MADV_POPULATE_WRITE = 23  # of Linux 5.14: get the pages now


@dataclass
class Segment:
    """A part of the memory, mapped: bytes `start` to `start + len(memory)`, of which the first `used` are in use."""

    start: int
    memory: mmap.mmap
    used: int = 0
    allotted: bool = False
    pinned: bool = False

    @property
    def free(self) -> int:
        """Bytes that are left."""
        return len(self.memory) - self.used


class SharedMemory:
    """Storages one after the other, in memory that grows when it must and is used again after `clear`.

    size: bytes to begin with, which whoever has the handle may `allot`; pinned: for a GPU, whose copies then need no detour. Memory that
    can't be pinned is used as it is, with a warning.
    """

    def __init__(self, size: int, *, pinned: bool = False):
        # Not in /dev/shm: a container has 64 MB there, and what is left after a crash stays until somebody finds it.
        self.handle = os.memfd_create("dsclip-checkpoint")
        self._pinned = pinned
        self._segments: list[Segment] = []
        os.truncate(self.handle, pages(size))
        self._map(0, pages(size))

    def reserve(self, size: int) -> None:
        """Makes room for so many bytes beyond those in use. Raises OSError when there is no memory."""
        if sum(segment.free for segment in self._segments) < size:
            self._grow(pages(size))

    def clear(self) -> None:
        """Everything may be written over. Raises OSError when there is less memory than was asked for."""
        for segment in self._segments:
            if not segment.allotted:
                allot(self.handle, segment.start, segment.memory)
            segment.used, segment.allotted = 0, True

    def take(self, size: int) -> tuple[int, UntypedStorage]:
        """(place, a storage of so many bytes) that nothing else uses. Raises OSError when there is no memory."""
        if not size:
            return 0, UntypedStorage(0)
        segment = next((s for s in self._segments if s.free >= size), None)
        if segment is None:
            self._grow(pages(size))
            segment = self._segments[-1]
        begin = segment.used
        segment.used = min(len(segment.memory), -(-(begin + size) // ALIGNMENT) * ALIGNMENT)
        numbers = torch.frombuffer(segment.memory, dtype=torch.uint8, offset=begin, count=size)
        return segment.start + begin, numbers.untyped_storage()

    def close(self) -> None:
        """Gives the memory back, once the storages in it are gone too. Twice does nothing."""
        for segment in self._segments:
            if segment.pinned:
                _unpin(segment.memory)
        if self._segments:
            os.close(self.handle)
        self._segments = []

    def _grow(self, size: int) -> None:
        start = os.fstat(self.handle).st_size
        os.truncate(self.handle, start + size)
        self._map(start, size)
        allot(self.handle, start, self._segments[-1].memory)

    def _map(self, start: int, size: int) -> None:
        memory = mapped(self.handle, start, size)
        self._segments.append(Segment(start, memory, pinned=self._pinned and _pin(memory)))


class Mapped:
    """The other process's look at the memory. It is mapped once, and again when it has grown: a new mapping costs a fault a page."""

    def __init__(self, handle: int):
        self._handle = handle
        self._memory: mmap.mmap | None = None

    def allot(self, size: int) -> None:
        """See `allot`; of the first bytes."""
        self._memory = mapped(self._handle, 0, size)
        allot(self._handle, 0, self._memory)

    def at(self, place: int, size: int) -> UntypedStorage:
        """A storage that the rank took, of at least one byte."""
        if self._memory is None or len(self._memory) < place + size:
            self._memory = mapped(self._handle, 0, os.fstat(self._handle).st_size)
        return torch.frombuffer(self._memory, dtype=torch.uint8, offset=place, count=size).untyped_storage()


def mapped(handle: int, start: int, size: int) -> mmap.mmap:
    """Bytes of the memory, in large pages where the system has them: copying is faster then, by 1.4 times where it was measured."""
    memory = mmap.mmap(handle, size, offset=start)
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def allot(handle: int, start: int, memory: mmap.mmap) -> None:
    """Gets mapped memory now. Raises OSError where there is none; without it, touching the memory would end the process."""
    with contextlib.suppress(OSError):  # older systems get small pages from the next line
        memory.madvise(MADV_POPULATE_WRITE)
    os.posix_fallocate(handle, start, len(memory))


def pages(size: int) -> int:
    """Bytes of the whole pages that hold so many, at least one."""
    return max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE


def _pin(memory: mmap.mmap) -> bool:
    """Lets the GPU write into the memory by itself while the host goes on, until `_unpin`. Whether it may."""
    error = int(torch.cuda.cudart().cudaHostRegister(_address(memory), len(memory), 0))
    if not error:
        return True
    # CUDA remembers the error, and the next kernel of whomever would be blamed for it.
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
    warnings.warn(
        f"{len(memory) / 1e9:.3g} GB of host memory can't be pinned (CUDA error {error}): checkpoints are copied there more slowly",
        stacklevel=2,
    )
    return False


def _unpin(memory: mmap.mmap) -> None:
    """Memory that is unmapped while it is pinned stays in use, and what is mapped to its addresses next can't be pinned."""
    with contextlib.suppress(RuntimeError):  # of a device that has failed
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(_address(memory))


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
