"""The training loader: endless batches whose content is a function of the seed, with a position that can be resumed.

`order` says which samples make global batch b; here each rank takes the part of its streams, split over its workers, and
puts it together in the order of the streams. The position travels with the batch: workers are ahead of training.
"""

from __future__ import annotations

import gc
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from dsclip.config.data_section import DataSection
from dsclip.config.objective_section import ViewSection
from dsclip.data.batch import Batch, State, summed
from dsclip.data.decoding.tokenizer import Tokenizer
from dsclip.data.joining import join
from dsclip.data.order.shards import ShardOrder
from dsclip.data.ordered_sets import ordered_sets
from dsclip.data.reading.part import Part
from dsclip.data.reading.samples import SampleReader
from dsclip.data.reading.slots import image_slots
from dsclip.data.reading.stream import StreamWorker
from dsclip.data.reading.worker import PREFETCH, Parts, Settings, Worker
from dsclip.data.shards import identity as same_shards
from dsclip.data.sources.storage import Storage
from dsclip.distributed import STOP_SIGNALS
from dsclip.errors import UserError


def build_loader(
    data: DataSection,
    *,
    tokenizer: Tokenizer,
    image_size: int,
    context_length: int,
    global_batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    hard_negatives: bool = False,
    views: tuple[ViewSection, ...] = (),
    classes: int = 0,
    taught_passes: int | None = None,
    state: State | None = None,
) -> Loader:
    """This rank's endless iterable over its n = N / world_size samples of every global batch.

    A `Batch` has images uint8 [n, 3, S, S], keys and a state; with hard_negatives also their tokens and owners, with flips
    or colour jitter augmentation. views: further ones of the same samples, other crops and colours (image_2) or another of a
    sample's captions (text_2). classes: so many that samples are of one by their `.cls`, whose numbers a batch then has. taught_passes: so
    many passes over the data have a teacher's features in the samples, which are then among the views, and later passes repeat the crops and
    captions of the first. That state, or those of all ranks of another run put together by `merge_states`,
    continues with exactly the next batch, on any number of ranks and workers. Raises UserError for shards that are missing
    or all unusable, and for a split that doesn't divide the streams. With `data.order: stream` the state says which shards
    are finished, and continues with the others on as many ranks and workers.
    """
    storage = Storage(tuple(data.trusted_hosts), data.retries)
    exact = data.order == "exact"
    order, sets = ordered_sets(data, storage, global_batch_size, seed, world_size)
    identity: dict[str, Any] = {
        "global_batch_size": global_batch_size, "streams" if exact else "readers (ranks x workers)": order.streams,
        "seed": seed, "shuffle_window": data.shuffle_window, "resampled": data.resampled, **same_shards.identity(sets),
    }  # fmt: skip
    identity |= {"shuffle_unit": data.shuffle_unit, "weights": data.weights} if exact else {"order": "stream"}
    share = order.streams // world_size
    settings = Settings(
        data, order, [SampleReader(s, storage, data.max_sample_bytes) for s in sets], tokenizer, image_size, context_length,
        global_batch_size, seed, rank, (rank * share, (rank + 1) * share), hard_negatives, views, classes,
        taught_passes,
    )  # fmt: skip
    problems: Counter[str] = Counter()
    journal: list[dict[str, str]] = []
    if rank == 0 and state is None:
        for shards in sets:
            problems.update(shards.problems)
            journal += [
                {"shard": shards.name(i), "what": "damaged", "detail": lost} for i, lost in shards.damage.items()
            ]
    return Loader(settings, identity, state, problems, journal)


def merge_states(states: list[State]) -> State:
    """One state of all streams from those of the ranks, in any order. Raises UserError for those of other versions."""
    if not all("first" in state and "drawn" in state for state in states):
        raise UserError(
            "the checkpoint's position in the data is that of an earlier version of dsclip; start a new run from its weights "
            "with model.init"
        )
    states = sorted(states, key=lambda s: s["first"])
    return states[0] | {"first": 0, "drawn": [drawn for state in states for drawn in state["drawn"]]}


class Loader:
    """Iterates over batches and keeps the position of all streams of this rank.

    set_samples: of each set that is mixed; damaged {shard: what is lost}: of shards without a manifest, on rank 0.
    """

    def __init__(
        self, settings: Settings, identity: dict[str, Any], state: State | None, problems: Counter[str],
        journal: list[dict[str, str]],
    ):  # fmt: skip
        self._settings, self._identity, self._problems, self._journal = settings, identity, problems, journal
        self.damaged = {entry["shard"]: entry["detail"] for entry in journal}
        self.set_samples = settings.order.set_samples
        first, stop = settings.streams
        self._batches, self._drawn = 0, [settings.order.start] * (stop - first)
        if state is not None:
            _check_state(state, identity)
            self._batches = state["batches"]
            self._drawn = state["drawn"][first - state["first"] : stop - state["first"]]
            if first < state["first"] or len(self._drawn) != stop - first:
                raise UserError("the state is that of another rank; put the states of all ranks together first")

    def __iter__(self) -> Iterator[Batch]:
        workers = self._settings.data.workers
        slots = image_slots(self._settings)
        worker = StreamWorker if isinstance(self._settings.order, ShardOrder) else Worker
        loader = DataLoader(
            Parts(worker, self._settings, self._drawn, slots),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
        )
        parts, number = iter(loader), self._batches
        while True:
            depth = _queue_depth(parts)
            of_batch = [_checked(next(parts)) for _ in range(self._settings.workers)]
            if slots is not None:
                of_batch = [replace(part, images=slots[w, part.images]) for w, part in enumerate(of_batch)]
            number += 1
            yield self._joined(of_batch, number, depth)

    def _joined(self, parts: list[Part], number: int, queue_depth: int | None) -> Batch:
        """Batch `number`, counted from 1, with the position after it and what the workers had to say."""
        first, _ = self._settings.streams
        report = summed([part.report for part in parts])
        drawn = [counts for part in parts for counts in part.drawn]
        report = replace(
            report, bad=dict(Counter(report.bad) + self._problems), journal=self._journal + report.journal,
            queue_depth=queue_depth, epoch=self._settings.order.epochs(number * self._settings.global_batch, drawn, first),
        )  # fmt: skip
        self._problems, self._journal = Counter(), []
        state = {"batches": number, "first": first, "drawn": drawn, "order": self._identity}
        return join(parts, [view.name for view in self._settings.views], state, report)


def _check_state(state: State, identity: dict[str, Any]) -> None:
    written = state.get("order", {})
    orders = [kind.get("order", "exact") for kind in (written, identity)]
    if orders[0] != orders[1]:
        raise UserError(
            f"data.order was {orders[0]} and is {orders[1]}: positions of one order mean nothing in the other. Use what the "
            "checkpoint was written with, or start a new run from its weights with model.init"
        )
    settings = [name for name in identity if name not in same_shards.NAMES and written.get(name) != identity[name]]
    changes = [f"{name} was {written.get(name)} and is {identity[name]}" for name in settings]
    if changes := changes or list(filter(None, [same_shards.difference(written, identity)])):
        raise UserError(
            f"the order of the data is not that of the checkpoint: {changes[0]}. Use what the checkpoint was written with, or "
            "start a new run from its weights with model.init."
        )


def _checked(part: Part | UserError) -> Part:
    if isinstance(part, UserError):
        raise part
    return part


def _queue_depth(parts: Iterator[Part | UserError]) -> int | None:
    """Parts that wait to be taken, where torch's loader lets one look."""
    queue = getattr(parts, "_data_queue", None)  # torch's own name; without workers there is no queue
    try:
        return None if queue is None else int(queue.qsize())
    except NotImplementedError:  # macOS can't count a queue
        return None


def _as_it_is(part: Any) -> Any:
    return part


def _start_worker(_: int) -> None:
    # A launcher stops the whole tree of processes: the rank decides when its workers end, and they notice when it is gone.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # what the rank holds of a GPU can't be freed in a process that was forked from it
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
