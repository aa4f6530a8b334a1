"""A rank's part of a checkpoint as copies in shared memory, from which another process writes the same bytes.

`torch.save` is a pickle of everything but numbers, and records of those. The pickle is made here, of the objects themselves but
with tensors whose storages lie in the shared memory; the records are noted by place. So what the other process writes
depends on nothing that unpickling might change.
"""

from __future__ import annotations

import copy
import ctypes
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from dsclip.saving.files import Problem, as_checkpoints_are_saved
from dsclip.saving.shared_memory import ALIGNMENT, SharedMemory


@dataclass(frozen=True)
class Record:
    """Bytes in the shared memory by their name in the file; of a tensor also its dtype and shape."""

    name: str
    place: int
    size: int
    dtype: str = ""
    shape: tuple[int, ...] = ()


@dataclass
class FileJob:
    """A file to be written: `torch` and `tensors` from records, `text` from its content."""

    kind: str
    path: str
    records: list[Record] = field(default_factory=list)
    metadata: dict[str, str] | None = None
    content: str = ""


class CopiedFiles:
    """`Files` that are copied and not yet written. Numbers of a GPU are on their way until `complete` returns."""

    def __init__(self, memory: SharedMemory, device: torch.device):
        self.problem: Problem | None = None
        self.jobs: list[FileJob] = []
        self._memory = memory
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        try:
            memory.clear()
        except OSError as error:
            self.problem = no_memory(error)

    def torch(self, content: Any, path: Path) -> None:
        """See `Files`."""

        def copy(job: FileJob) -> None:
            copies = HostCopies(self._memory, self._stream)
            copied = copies.of(content)
            noted = _Records(self._memory, copies.places)
            with tagged(copies.locations), as_checkpoints_are_saved():
                # The file's own writer would hash and write each record where this one notes it.
                torch.serialization._save(copied, noted, pickle, 2, False)
            job.records = noted.records

        self._copied(FileJob("torch", str(path)), copy)

    def tensors(self, tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        """See `Files`."""

        def copy(job: FileJob) -> None:
            copies = HostCopies(self._memory, self._stream)
            for name, tensor in tensors.items():
                numbers = tensor.detach().view(-1).view(torch.uint8)
                dtype = str(tensor.dtype).removeprefix("torch.")
                job.records.append(Record(name, copies.numbers(numbers), len(numbers), dtype, tuple(tensor.shape)))

        self._copied(FileJob("tensors", str(path), metadata=metadata), copy)

    def text(self, content: str, path: Path) -> None:
        """See `Files`."""
        self.jobs.append(FileJob("text", str(path), content=content))

    def complete(self) -> list[dict[str, Any]]:
        """What the other process needs to know, as JSON holds it, once all copies have arrived."""
        if self._stream is not None:
            self._stream.synchronize()
        return [asdict(job) for job in self.jobs]

    def _copied(self, job: FileJob, copy: Callable[[FileJob], None]) -> None:
        """The job counts when copy(job) went well, and all before."""
        if self.problem is not None:
            return
        try:
            copy(job)
            self.jobs.append(job)
        except OSError as error:
            self.problem = no_memory(error)


def no_memory(error: OSError) -> Problem:
    """In words that all ranks can be told."""
    return Problem(f"there is no memory for a copy of the checkpoint ({error.strerror or error})")


class HostCopies:
    """Copies of tensors in the shared memory: as many storages as there were, with the same views of them.

    places: {a copy's storage: its place}; locations: {a copy's storage: where torch says that the numbers were}, of a GPU.
    """

    def __init__(self, memory: SharedMemory, stream: torch.cuda.Stream | None):
        self._memory, self._stream = memory, stream
        self._copied: dict[int, UntypedStorage] = {}
        self.places: dict[int, int] = {}
        self.locations: dict[int, str] = {}

    def of(self, content: Any) -> Any:
        """The same containers and objects, with the copies in the place of tensors."""
        found = {id(tensor): tensor for tensor in tensors_in(content)}
        storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in found.values()}
        self._memory.reserve(sum(storage.nbytes() + ALIGNMENT for storage in storages.values()))
        return copy.deepcopy(content, {number: self._copy(tensor) for number, tensor in found.items()})

    def numbers(self, numbers: Tensor) -> int:
        """The place of a copy of uint8 numbers."""
        place, storage = self._memory.take(len(numbers))
        self._fill(storage, numbers)
        return place

    def _copy(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        host = self._copied.get(storage._cdata)
        if host is None:
            place, host = self._memory.take(storage.nbytes())
            self._fill(host, torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
            self._copied[storage._cdata] = host
            self.places[host._cdata] = place
            if storage.device.type != "cpu":
                self.locations[host._cdata] = torch.serialization.location_tag(storage)
        copied = torch.empty(0, dtype=tensor.dtype)
        copied.set_(host, tensor.storage_offset(), tensor.size(), tensor.stride())
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=False)
        vars(copied).update(vars(tensor))  # DeepSpeed's notes, which are saved too
        return copied.requires_grad_(tensor.requires_grad)

    def _fill(self, storage: UntypedStorage, numbers: Tensor) -> None:
        target = torch.empty(0, dtype=torch.uint8).set_(storage)
        if not len(numbers):
            return
        if self._stream is None or numbers.device.type == "cpu":
            # Past the caches, which torch's own copy goes through: 1.4 to 2.2 times as fast for large tensors. Python's lock is free.
            ctypes.memmove(target.data_ptr(), numbers.contiguous().data_ptr(), len(numbers))
            return
        with torch.cuda.stream(self._stream):
            target.copy_(numbers, non_blocking=True)
            numbers.record_stream(self._stream)


class _Records:
    """What `torch.save` would write into its file, noted."""

    def __init__(self, memory: SharedMemory, places: Mapping[int, int]):
        self.records: list[Record] = []
        self._memory, self._places = memory, places

    def write_record(self, name: str, content: str | bytes | UntypedStorage, size: int) -> None:
        """As torch's own writer is told."""
        place = None if isinstance(content, str | bytes) else self._places.get(content._cdata)
        if place is None:  # the pickle, or a tensor that was hidden in an object
            place, storage = self._memory.take(size)
            if isinstance(content, UntypedStorage):
                storage.copy_(content, False)
            elif size:
                data = content.encode() if isinstance(content, str) else content
                storage.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage(), False)
        self.records.append(Record(name, place, size))


def tensors_in(content: Any) -> Iterator[Tensor]:
    """All tensors in dicts, lists and tuples."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from tensors_in(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from tensors_in(value)


_locations: dict[int, str] = {}


@contextmanager
def tagged(locations: Mapping[int, str]) -> Iterator[None]:
    """Within it torch says of these storages that they are elsewhere, as the file of an uncopied state would."""
    _register()
    _locations.update(locations)
    try:
        yield
    finally:
        _locations.clear()


@cache
def _register() -> None:
    before_cpu = 5
    torch.serialization.register_package(before_cpu, lambda x: _locations.get(x._cdata), lambda _, __: None)
