"""A loader worker that streams whole shards through webdataset's pipeline, for `data.order: stream`.

Shards are opened by our own storage: no address reaches a shell. Nothing needs to be known of a shard before it is
read. Samples are shuffled in a buffer, and a shard is finished when the last of its samples has been used.
"""

from __future__ import annotations

import random
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander

from dsclip.data.decoding.sample import MEMBER_EXTENSIONS, BadSample, RawSample
from dsclip.data.order.shards import ShardOrder
from dsclip.data.reading.worker import Settings, Worker
from dsclip.data.shards.tar_index import BLOCK, DamagedTar, parse_header, split_name
from dsclip.data.sources.sequential import SequentialFile
from dsclip.data.sources.storage import SourceError
from dsclip.errors import UserError

MOST_UNUSABLE = 10_000  # samples in a row; how many there are isn't known
TAIL_BYTES = 1 << 16  # looked at behind the end of an archive, where writers leave zeros


@dataclass
class Visit:
    """A shard on its way through a stream. waiting: samples that were read and not used yet."""

    shard: int
    round: int  # see `order.exact.Draw`
    waiting: int = 0
    read: bool = False  # to its end


@dataclass(frozen=True)
class _Item:
    visit: Visit
    content: RawSample | Exception


class StreamWorker(Worker):
    """Reads the shards of its one stream. drawn: {stream: [shards finished]}."""

    def __init__(self, settings: Settings, drawn: dict[int, list[int]], slots: torch.Tensor | None = None):
        super().__init__(settings, drawn, slots)
        if not isinstance(settings.order, ShardOrder):
            raise TypeError("a stream needs an order of shards")
        self._order = settings.order
        self._total = MOST_UNUSABLE
        (self._samples,) = settings.sample_readers
        (self._stream,) = drawn
        self._visits: deque[Visit] = deque()
        self._waited_s = 0.0
        start = drawn[self._stream][0]
        self._endless = self._epochs(start)

    @property
    def _waited(self) -> float:
        return self._waited_s

    def _read_ahead(self) -> None:
        return None  # a stream is its own

    def _next_raw(self, stream: int) -> tuple[str, int, Callable[[], RawSample]]:
        item = next(self._endless)
        item.visit.waiting -= 1
        while self._visits and self._visits[0].read and not self._visits[0].waiting:
            self._visits.popleft()
            self._drawn[stream][0] += 1
        name = self._samples.shards.name(item.visit.shard)
        return name, item.visit.round, partial(self._content, name, item.content)

    def _content(self, name: str, content: RawSample | Exception) -> RawSample:
        if isinstance(content, SourceError):
            self._unreadable(name, content)
        if isinstance(content, Exception):
            raise content
        return content

    def _epochs(self, number: int) -> Iterator[_Item]:
        """The items of the stream's shards from its `number`-th on, endlessly; an epoch leaves the buffer before the next."""
        window = self._settings.data.shuffle_window
        while True:
            stop = self._order.epoch_ends(self._stream, number)
            rng = random.Random(f"{self._settings.seed} {self._stream} {number}")
            # The buffer is full before the first sample leaves it: first batches are shuffled as well as the others.
            shuffled = wds.shuffle(window, initial=window, rng=rng)
            yield from wds.DataPipeline(partial(self._items, number, stop), shuffled)
            number = stop

    def _items(self, number: int, stop: int) -> Iterator[_Item]:
        """The samples of the stream's shards from its `number`-th up to `stop`, and what is wrong with them."""
        empty = 0
        for visited in range(number, stop):
            visit = Visit(*self._order.visit(self._stream, visited))
            self._visits.append(visit)
            empty += 1
            for content in self._shard(visit.shard):
                visit.waiting += 1
                empty = 0
                yield _Item(visit, content)
            visit.read = True
            if empty >= self._order.an_epoch(self._stream):
                raise UserError(
                    f"rank {self._settings.rank}: there is no sample in any of the {empty} shards that a loader worker reads"
                )

    def _shard(self, shard: int) -> Iterator[RawSample | Exception]:
        """The samples of a shard; what is wrong with it comes as an exception and ends it."""
        shards, file = (
            self._samples.shards,
            SequentialFile(self._samples.storage, self._samples.shards.locations[shard]),
        )
        repeated: Counter[str] = Counter()
        try:
            for sample in _samples_of(file, partial(_counted, repeated)):
                if sum(map(len, sample.values())) > self._samples.most_bytes:
                    yield BadSample("sample too large")
                    continue
                members = {name: content for name, content in sample.items() if not name.startswith("__")}
                yield RawSample(shards.identity(shard), sample["__key__"], members)
            if file.read(TAIL_BYTES).strip(b"\0"):  # tarfile stops at a broken header, without a word
                raise DamagedTar("something follows its end")
        except (SourceError, tarfile.TarError, DamagedTar, EOFError, ValueError, OverflowError) as error:
            if file.failure is not None:
                yield SourceError(file.failure)
            else:  # webdataset adds the file to an error's arguments
                self._note(shards.name(shard), "damaged, read as far as it goes", str(error.args[0]))
                yield BadSample("damaged shard")
        finally:
            self._waited_s += file.waited_s
            file.close()
        for _ in range(repeated["repeated key"]):
            yield BadSample("repeated key")


def _samples_of(file: SequentialFile, handler: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """{"__key__", extension: bytes} of an uncompressed tar; a sample at the place of damage is dropped whole."""
    head = file.read(BLOCK)
    if head and head != bytes(len(head)):
        parse_header(head.ljust(BLOCK, b"\0"), 0)  # no compressed archive, which could be larger than all memory
    file.push_back(head)
    source = [{"url": str(file), "stream": file}]
    members = tar_file_expander(source, select_files=_is_read, eof_value={})
    yield from group_by_keys(members, keys=split_name, handler=handler)


def _is_read(name: str) -> bool:
    return split_name(name)[1] in MEMBER_EXTENSIONS


def _counted(repeated: Counter[str], error: Exception) -> bool:
    """webdataset's handler of members that a sample has already: the first one is kept."""
    if not isinstance(error, ValueError):
        raise error
    repeated["repeated key"] += 1
    return True
