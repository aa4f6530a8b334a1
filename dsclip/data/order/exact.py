"""The order of samples, as a function of (seed, manifest, N, b) alone: no file is opened here.

A global batch of N samples has V virtual streams with N/V slots each; a rank, and a worker of it, owns V/(ranks·workers)
of them, which is why every split gives the same batches. An epoch permutes units of neighbouring samples, and each
stream takes a contiguous part of that sequence, shuffled within closed windows. The parts of an epoch add up to every
sample once, and their lengths are such that streams, drawn from equally, change epoch together.

Symbols: M samples, S shards, V streams, N global batch, e epoch, v stream, d how many samples a stream has drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsclip.data.order.laps import Laps
from dsclip.data.order.recent import Recent
from dsclip.errors import UserError

MOST_STREAMS = 1024
# Up to so many samples every one is permuted on its own; beyond, shards stay together and are read in sequence.
LARGEST_FULL_SHUFFLE = 2_000_000
_MIX, _WINDOW, _UNITS = 1, 2, 4  # what a random number is for


@dataclass(frozen=True)
class Draw:
    """One sample to read. round: the epoch, or with resampling the lap; randomness of the sample depends on it."""

    data_set: int
    shard: int
    position: int
    round: int


def default_streams(global_batch: int) -> int:
    """The largest divisor of N up to 1024."""
    return max(v for v in range(1, min(global_batch, MOST_STREAMS) + 1) if global_batch % v == 0)


def check_split(streams: int, global_batch: int, world_size: int, workers: int) -> None:
    """Raises UserError when V streams can't be shared equally by the ranks and their workers; it names what can."""
    if global_batch % streams:
        raise UserError(f"data.streams is {streams}; it must divide batch.global_batch_size {global_batch}")
    processes = max(1, workers)
    if streams % world_size:
        fitting = [w for w in range(1, streams + 1) if streams % w == 0]
        raise UserError(
            f"{world_size} ranks can't share {streams} data streams equally; use one of {_some(fitting)} ranks, or a "
            "batch.global_batch_size (or data.streams) that the number of ranks divides"
        )
    if streams // world_size % processes:
        share = streams // world_size
        fitting = [w for w in range(1, share + 1) if share % w == 0]
        raise UserError(
            f"{workers} loader workers can't share a rank's {share} of {streams} data streams equally; set data.workers to "
            f"one of 0, {_some(fitting)}"
        )


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (", …" if len(numbers) > 12 else "")


class SetOrder:
    """The order of one data set with S shards of `sizes` samples."""

    def __init__(
        self, sizes: np.ndarray, *, global_batch: int, streams: int, seed: int, window: int, unit: int | None = None,
        resampled: bool = False,
    ):  # fmt: skip
        self.total = int(sizes.sum())
        self._batch, self._streams, self._quota = global_batch, streams, global_batch // streams
        self._seed, self.window = seed, window
        self._shard_ends = np.cumsum(sizes)
        self._laps = None
        if resampled:
            self._laps = Laps(self.total, global_batch=global_batch, streams=streams, seed=seed, window=window)
            return
        if unit is None:
            unit = 1 if self.total <= LARGEST_FULL_SHUFFLE else int(sizes.max(initial=1))
        self._unit_starts, self._unit_sizes = _units(sizes, unit)
        self._epoch = Recent(self._permuted, 2)
        self._shuffled = Recent(self._shuffled_window, 2 * streams)

    def draw(self, stream: int, drawn: int) -> tuple[int, int, int]:
        """(shard, position in it, round) of the sample that `stream` draws after `drawn` others."""
        if self._laps is not None:
            sample, lap = self._laps.draw(stream, drawn)
            return (*self._locate(sample), lap)
        epoch = self.epoch_of(stream, drawn)
        first = self._drawn_before(stream, epoch)
        length = self._drawn_before(stream, epoch + 1) - first
        number, inside = divmod(drawn - first, self.window)
        size = min(self.window, length - number * self.window)
        place = number * self.window + int(self._shuffled(epoch, stream, number, size)[inside])
        units, ends = self._epoch(epoch)
        place += self._offset(stream, epoch)
        unit = int(np.searchsorted(ends, place, side="right"))
        inside = place - (int(ends[unit - 1]) if unit else 0)
        return (*self._locate(int(self._unit_starts[units[unit]]) + inside), epoch)

    def epoch_of(self, stream: int, drawn: int) -> int:
        """The epoch in which a stream is that has drawn so many samples."""
        epoch = drawn * self._streams // self.total
        while self._drawn_before(stream, epoch + 1) <= drawn:
            epoch += 1
        while self._drawn_before(stream, epoch) > drawn:
            epoch -= 1
        return epoch

    def _drawn_before(self, stream: int, epoch: int) -> int:
        """What a stream draws before an epoch begins: its slots among the first e·M of the global sequence."""
        batches, rest = divmod(epoch * self.total, self._batch)
        return batches * self._quota + min(max(rest - stream * self._quota, 0), self._quota)

    def _offset(self, stream: int, epoch: int) -> int:
        """Where a stream's part of an epoch begins: the lengths of the parts of all streams before it."""

        def before(e: int) -> int:
            batches, rest = divmod(e * self.total, self._batch)
            return batches * self._quota * stream + min(rest, stream * self._quota)

        return before(epoch + 1) - before(epoch)

    def _permuted(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(units in the order of an epoch, where each ends in the sequence of samples)."""
        units = np.random.default_rng([self._seed, _UNITS, epoch]).permutation(len(self._unit_starts))
        return units, np.cumsum(self._unit_sizes[units])

    def _shuffled_window(self, epoch: int, stream: int, number: int, size: int) -> np.ndarray:
        return np.random.default_rng([self._seed, _WINDOW, epoch, stream, number]).permutation(size)

    def _locate(self, sample: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._shard_ends, sample, side="right"))
        return shard, sample - (int(self._shard_ends[shard - 1]) if shard else 0)


def _units(sizes: np.ndarray, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """(first sample, size) of the units of at most `unit` neighbours into which shards are cut."""
    if unit == 1:
        total = int(sizes.sum())
        return np.arange(total), np.ones(total, dtype=np.int64)
    counts = -(-sizes // unit)
    inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(np.cumsum(sizes) - sizes, counts) + inside * unit
    return starts, np.minimum(unit, np.repeat(sizes, counts) - inside * unit)


class Order:
    """The draws of all streams over one or several data sets, mixed by weight.

    A position is how many samples each stream has drawn of each data set, bad ones included.
    """

    def __init__(self, sets: list[SetOrder], weights: list[float] | None, streams: int, seed: int):
        self.sets, self.streams, self._seed = sets, streams, seed
        shares = np.ones(len(sets)) if weights is None else np.asarray(weights, dtype=np.float64)
        self._bounds = np.cumsum(shares / shares.sum())[:-1]
        self._picks = Recent(self._pick_block, 2 * streams)

    def next(self, stream: int, drawn: list[int]) -> Draw:
        """The next draw of a stream that has drawn so many of each data set; counts it in `drawn`."""
        data_set = 0
        if len(self.sets) > 1:
            block, inside = divmod(sum(drawn), _BLOCK)
            data_set = int(self._picks(stream, block)[inside])
        draw = Draw(data_set, *self.sets[data_set].draw(stream, drawn[data_set]))
        drawn[data_set] += 1
        return draw

    @property
    def set_samples(self) -> list[int]:
        """Samples of each data set."""
        return [s.total for s in self.sets]

    @property
    def start(self) -> list[int]:
        """Where a stream begins."""
        return [0] * len(self.sets)

    def epochs(self, samples: int, drawn: list[list[int]], first: int) -> float:
        """Passes over the data after so many samples of all streams."""
        return samples / sum(self.set_samples)

    def _pick_block(self, stream: int, block: int) -> np.ndarray:
        """The data sets of the next 4096 draws: each is drawn for itself, so that shares hold in expectation."""
        numbers = np.random.default_rng([self._seed, _MIX, stream, block]).random(_BLOCK)
        return np.searchsorted(self._bounds, numbers, side="right")


_BLOCK = 4096
