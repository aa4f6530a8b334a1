"""Reads what a worker's streams will draw from remote shards, before they draw it: in threads, within a bound of memory.

A stream is read in blocks of draws, far smaller than its shuffle window where memory asks for it; one block is read while
the one before is used. Blocks begin small, so that the first batch comes soon, and streams reach their full size one
after another, so that they don't all wait for new blocks at the same batch. Nothing here changes what is drawn.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

from dsclip.data.decoding.sample import BadSample
from dsclip.data.order.exact import SetOrder
from dsclip.data.reading.samples import SampleReader
from dsclip.data.sources.storage import SourceError, is_remote

T = TypeVar("T")

THREADS = 16  # of a worker: with 20 ms of latency, 800 requests a second
GAP = 1 << 16  # two samples with fewer bytes between them are read at once
RUN_BYTES = 1 << 22  # the most of one request, unless a single sample is larger
_TYPICAL_BYTES = 1 << 16  # of a sample, where no manifest tells


class Threads:
    """Runs functions in the order given. Daemons: a read that hangs must not hold up the end of a worker."""

    def __init__(self, count: int = THREADS):
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._count, self._closed = count, False
        for _ in range(count):
            threading.Thread(target=self._run, daemon=True).start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """What it will return or raise."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._queue.put(run)
        return future

    def close(self) -> None:
        """Lets go of all that hasn't begun."""
        self._closed = True
        for _ in range(self._count):
            self._queue.put(None)

    def _run(self) -> None:
        while (task := self._queue.get()) is not None and not self._closed:
            task()


class Range(NamedTuple):
    """The bytes of the sample of a draw."""

    shard: int
    start: int
    size: int
    draw: int


# Of each draw: the run of neighbours that is read with it, or why there is nothing to read; and how many bytes it has.
_Planned = dict[int, tuple[Future[dict[int, bytes]] | Exception, int]]


class _Block(NamedTuple):
    """Draws from `first` to `stop`."""

    first: int
    stop: int
    planned: Future[_Planned]


@dataclass
class _Stream:
    begun: int  # its first draw here
    next: int  # the first draw that is in no block yet
    size: int  # of the next block
    first_full: int  # size of the block after which all have full size: differs from stream to stream
    blocks: deque[_Block] = field(default_factory=deque)


class ReadAhead:
    """The remote part of one data set, for the streams of a worker.

    drawn: {stream: draws so far}; quota: draws a batch; most_bytes: of what is read and not yet used, beyond the least that the next batch
    needs. peak_bytes, waited_s: the most that was held, and the time that `take` waited.
    """

    def __init__(
        self, samples: SampleReader, order: SetOrder, drawn: dict[int, int], quota: int, most_bytes: int, threads: Threads
    ):  # fmt: skip
        self._samples, self._order, self._threads = samples, order, threads
        self._most_bytes, self._held, self._lock = most_bytes, 0, threading.Lock()
        self.peak_bytes, self.waited_s = 0, 0.0
        known = samples.shards.shard_bytes >= 0
        counted = int(samples.shards.samples[known].sum())
        self._mean = max(1, int(samples.shards.shard_bytes[known].sum()) // counted if counted else _TYPICAL_BYTES)
        # Of every stream, one block is used while another is read.
        self._full = min(max(1, most_bytes // (2 * len(drawn) * self._mean)), order.window)
        least = min(quota, self._full)
        self._streams = {
            stream: _Stream(place, place, least, least + (self._full - least) * number // len(drawn))
            for number, (stream, place) in enumerate(drawn.items(), 1)
        }
        for stream in drawn:
            self._extend(stream)

    def take(self, stream: int, draw: int) -> tuple[bytes | Exception, int]:
        """(bytes of the sample or why there are none, how many there should be). A stream's draws are taken in order."""
        state = self._streams[stream]
        while state.blocks and draw >= state.blocks[0].stop:
            state.blocks.popleft()
        if not state.blocks:
            self._extend(stream)
        if draw > state.begun:
            self._keep_ahead(stream)
        started = time.monotonic()
        reading, size = state.blocks[0].planned.result().pop(draw)
        content: bytes | Exception
        if isinstance(reading, Future):
            try:
                content = reading.result().pop(draw)
            except SourceError as error:
                content = error
        else:
            content = reading
        self.waited_s += time.monotonic() - started
        self._hold(-size)
        return content, size

    def fill(self) -> None:
        """Reads on after the first batch, during which nothing is read but what it takes."""
        for stream in self._streams:
            self._keep_ahead(stream)

    def _keep_ahead(self, stream: int) -> None:
        state = self._streams[stream]
        if len(state.blocks) <= 1 and self._held + state.size * self._mean <= self._most_bytes:
            self._extend(stream)

    def _extend(self, stream: int) -> None:
        """Begins to read the stream's next block."""
        state = self._streams[stream]
        draws = range(state.next, state.next + state.size)
        places = [(draw, *self._order.draw(stream, draw)[:2]) for draw in draws]
        places = [place for place in places if is_remote(self._samples.shards.locations[place[1]])]
        expected = len(places) * self._mean
        self._hold(expected)
        planned = self._threads.submit(lambda: self._plan(places, expected))
        state.blocks.append(_Block(draws.start, draws.stop, planned))
        state.next = draws.stop
        state.size = self._full if state.size >= state.first_full else min(2 * state.size, state.first_full)

    def _plan(self, places: list[tuple[int, int, int]], expected: int) -> _Planned:
        """Finds where the samples of (draw, shard, position) lie, which may need indexes, and has runs of neighbours read."""
        planned: _Planned = {}
        ranges = []
        for draw, shard, position in places:
            try:
                ranges.append(Range(shard, *self._samples.locate(shard, position), draw))
            except (BadSample, SourceError) as error:
                planned[draw] = error, 0
        self._hold(sum(r.size for r in ranges) - expected)
        for run in runs(sorted(ranges)):
            reading = self._threads.submit(partial(self._read, run))
            planned |= {r.draw: (reading, r.size) for r in run}
        return planned

    def _read(self, run: list[Range]) -> dict[int, bytes]:
        first, end = run[0].start, run[-1].start + run[-1].size
        content = self._samples.opened(run[0].shard).read(first, end - first)
        return {r.draw: content[r.start - first : r.start - first + r.size] for r in run}

    def _hold(self, size: int) -> None:
        with self._lock:
            self._held += size
            self.peak_bytes = max(self.peak_bytes, self._held)


def runs(ranges: list[Range]) -> Iterator[list[Range]]:
    """Sorted ranges as lists of neighbours that one request reads."""
    run: list[Range] = []
    for r in ranges:
        if run:
            last = run[-1]
            far = r.shard != last.shard or r.start - (last.start + last.size) > GAP
            if far or r.start + r.size - run[0].start > RUN_BYTES:
                yield run
                run = []
        run.append(r)
    if run:
        yield run
