"""The resampled order: long runs of neighbours, no sample twice in a global batch, every sample seen equally often.

The samples are a ring that is walked lap after lap. A *pass* is a segment of the walk: as many whole global batches as fit
on the ring. It begins where the one before ended, so that what a pass leaves over is the first of the next, and exposure
is even whatever the sizes. A pass is cut into *units* of `size` neighbours, at places that differ from pass to pass, and a
permutation gives every stream one unit in each of its rounds. Rounds begin with a global batch, so all samples of a batch
are of one pass, where units don't overlap.

Symbols: M samples, N global batch, V streams, q = N/V slots of a stream in a batch, P samples of a pass, R its rounds.
"""

from __future__ import annotations

import numpy as np

from dsclip.data.order.recent import Recent

_ORIGIN, _PASS, _UNIT = 7, 8, 9  # what a random number is for, beside those of `exact` and `shards`


class Laps:
    """Which sample a stream draws, and in which lap: each sample comes once a lap.

    pass_samples: P, at most M, and more than M - R·N; with fewer samples than N it is N, and a batch repeats them evenly.
    size: samples of a unit, a multiple of q, and at most `window` unless q is larger.
    """

    def __init__(self, total: int, *, global_batch: int, streams: int, seed: int, window: int):
        quota = global_batch // streams
        batches = max(1, total // global_batch)
        self.rounds = min(batches, -(-batches // max(1, window // quota)))
        self.size = batches // self.rounds * quota
        self.pass_samples = self.rounds * streams * self.size
        self._total, self._streams, self._seed = total, streams, seed
        self._origin = int(np.random.default_rng([seed, _ORIGIN]).integers(max(1, total)))
        self._cut = Recent(self._cut_pass, 2)
        self._shuffled = Recent(self._shuffled_unit, 2 * streams)

    def draw(self, stream: int, drawn: int) -> tuple[int, int]:
        """(sample, lap) that `stream` draws after `drawn` others."""
        number, inside = divmod(drawn, self.size)
        pass_, round_ = divmod(number, self.rounds)
        shift, units = self._cut(pass_)
        place = shift + int(units[round_ * self._streams + stream]) * self.size
        place = (place + int(self._shuffled(stream, number)[inside])) % self.pass_samples
        lap, sample = divmod(self._origin + pass_ * self.pass_samples + place, self._total)
        return sample, lap

    def _cut_pass(self, pass_: int) -> tuple[int, np.ndarray]:
        """(where in a pass its first unit begins, the units in the order of rounds and streams)."""
        rng = np.random.default_rng([self._seed, _PASS, pass_])
        # Without the shift, a set that passes fill exactly would be cut at the same places for ever.
        return int(rng.integers(self.size)), rng.permutation(self.rounds * self._streams)

    def _shuffled_unit(self, stream: int, number: int) -> np.ndarray:
        return np.random.default_rng([self._seed, _UNIT, stream, number]).permutation(self.size)
