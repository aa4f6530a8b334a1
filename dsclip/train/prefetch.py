"""Batches on the device before they are asked for: put together, copied and augmented beside the step that is running."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from queue import Empty, Full, Queue
from typing import Protocol, TypeVar

import torch

from dsclip.data.batch import Batch
from dsclip.data.decoding.augment import augment

T = TypeVar("T")
Given = TypeVar("Given", contravariant=True)
Queued = TypeVar("Queued")
Taken = TypeVar("Taken", covariant=True)
LOOK_S = 0.1  # how often a thread that waits looks whether it is still wanted


class Lane(Protocol[Given, Queued, Taken]):
    """Copies one batch while the one before is in use."""

    def queue(self, batch: Given, /) -> Queued:
        """Starts a copy."""

    def ready(self, queued: Queued, /) -> Taken:
        """The copy, once it is done."""


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches with their pixels on `device` and their images augmented.

    On a GPU a thread puts the next batch together in pinned memory, and it is copied on a stream of its own, while the
    current one trains. Positions stay with their batches.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _augmented(batch)
        return
    yield from pipelined(in_background(batches), CudaLane(device))


def pipelined(batches: Iterable[Given], lane: Lane[Given, Queued, Taken]) -> Iterator[Taken]:
    """Batch i is given out when the copy of batch i + 1 is queued, and waits for its own copy alone.

    lane.queue(batch) starts a copy and returns what lane.ready turns into the batch for the step.
    """
    ahead = None
    for batch in batches:
        following = lane.queue(batch)
        if ahead is not None:
            yield lane.ready(ahead)
        ahead = following
    if ahead is not None:
        yield lane.ready(ahead)


class CudaLane:
    """Copies on a stream of its own. An event behind each copy is what the step's stream waits for."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def queue(self, batch: Batch) -> tuple[Batch, torch.cuda.Event, Batch]:
        """(the batch on the device, the event that ends its copy, the pinned batch, which must live until then)."""
        with torch.cuda.stream(self._stream):
            copied = _augmented(batch.to(self._device))
            done = torch.cuda.Event()
            done.record(self._stream)
        return copied, done, batch

    def ready(self, queued: tuple[Batch, torch.cuda.Event, Batch]) -> Batch:
        """The batch for the current stream, which waits for this copy and keeps its memory from the next ones."""
        batch, done, _ = queued
        main = torch.cuda.current_stream(self._device)
        main.wait_event(done)
        for tensor in batch.pixels().values():
            tensor.record_stream(main)
        return batch


def in_background(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made by a thread while the one before is in use; an error is raised where its item was due.

    The first is made by the caller's thread: it starts the loader's workers, and those are forked from the main thread.
    """
    try:
        yield next(items)
    except StopIteration:
        return
    made: Queue[tuple[list[T], BaseException | None]] = Queue(maxsize=1)
    unwanted = threading.Event()

    def put(item: list[T], error: BaseException | None = None) -> bool:
        while not unwanted.is_set():
            try:
                made.put((item, error), timeout=LOOK_S)
                return True
            except Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put([item]):
                    return
            put([], StopIteration())
        except BaseException as error:  # of whatever kind: it is the consumer's
            put([], error)

    thread = threading.Thread(target=make, name="dsclip batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item[0]
    finally:
        unwanted.set()
        _drain(made)
        thread.join(timeout=10 * LOOK_S)


def _drain(queue: Queue[tuple[list[T], BaseException | None]]) -> None:
    try:
        while True:
            queue.get_nowait()
    except Empty:
        pass


def _augmented(batch: Batch) -> Batch:
    if batch.augmentation is None:
        return batch
    names = [name for name in batch.views if name.startswith("image")]
    images = [batch.images, *(batch.views[name] for name in names)]
    numbers = batch.augmentation.chunk(len(images), dim=1)
    first, *others = (augment(x, n) for x, n in zip(images, numbers, strict=True))
    return replace(batch, images=first, views=batch.views | dict(zip(names, others, strict=True)), augmentation=None)
