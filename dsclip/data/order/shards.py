"""The order of shards where samples can only be read one after the other: a function of (seed, epoch), as OpenCLIP's.

A stream here is one reader, a loader worker of a rank: it reads whole shards. Symbols: S shards, V streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsclip.errors import UserError

_ENDLESS = 1 << 62
_SHARDS, _RESAMPLE = 5, 6  # what a random number is for, beside those of `exact`


@dataclass(frozen=True)
class ShardOrder:
    """An epoch permutes S shards, and stream v reads every V-th of them from the v-th on.

    A position is how many shards a stream has finished. resampled: shards are drawn with replacement instead.
    """

    shards: int
    streams: int
    seed: int
    resampled: bool = False

    def visit(self, stream: int, number: int) -> tuple[int, int]:
        """(shard, epoch) that a stream reads after `number` others; with resampling every shard is an epoch of its own."""
        if self.resampled:
            rng = np.random.default_rng([self.seed, _RESAMPLE, stream, number])
            return int(rng.integers(self.shards)), number
        epoch, place = divmod(number, self.an_epoch(stream))
        order = np.random.default_rng([self.seed, _SHARDS, epoch]).permutation(self.shards)
        return int(order[stream + place * self.streams]), epoch

    def an_epoch(self, stream: int) -> int:
        """Shards that a stream reads in an epoch: S/V, rounded up for the first ones."""
        return len(range(stream, self.shards, self.streams))

    def epoch_ends(self, stream: int, number: int) -> int:
        """The first of a stream's visits after `number` that is of another epoch; with resampling there is no end."""
        own = self.an_epoch(stream)
        return _ENDLESS if self.resampled else number + own - number % own

    @property
    def set_samples(self) -> list[int]:
        """Of no data set is it known how many samples it has."""
        return []

    @property
    def start(self) -> list[int]:
        """Where a stream begins."""
        return [0]

    def epochs(self, samples: int, drawn: list[list[int]], first: int) -> float:
        """Passes over the data, in shards that the streams from `first` on have finished."""
        finished = sum(counts[0] for counts in drawn)
        return finished / sum(self.an_epoch(first + i) for i in range(len(drawn)))


def check_readers(shards: int, global_batch: int, world_size: int, workers: int) -> None:
    """Raises UserError when W ranks with these loader workers can't share shards and batch."""
    readers = world_size * max(1, workers)
    who = f"{world_size} ranks x {max(1, workers)} loader workers"
    if shards < readers:
        fitting = shards // world_size
        advice = f"set data.workers to {fitting} or less" if fitting else f"use {shards} ranks or less"
        raise UserError(
            f"with data.order=stream each of {who} reads shards of its own, and there are {shards}; {advice}, or cut the data "
            "into more shards (tools/make_shards.py --shard-size)"
        )
    if global_batch % readers:
        raise UserError(
            f"with data.order=stream {who} share each batch equally, and {readers} doesn't divide batch.global_batch_size "
            f"{global_batch}; change one of the three"
        )
