"""What failures cost a run: the effective training time ratio (ETTR), and the interval between saves at which it is best.

Failures come at random, a job's with the rates of its parts added up (a Poisson process). Each costs the steps since the
last save that was complete, and a restart, during which further ones may come. Sources: Young 1974; Daly 2006, "A higher
order estimate of the optimum checkpoint interval", whose formula this is where saving is not in the background; ETTR as
in Kokolis et al. 2024, "Revisiting Reliability in Large-Scale Machine Learning Research Clusters".
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

# Llama 3 (2024, table 5): 466 interruptions in 54 days of 16,384 GPUs, of which 419 were unexpected; one in 2.8 hours.
GPU_HOURS_A_FAILURE = 54 * 24 / 466 * 16_384


@dataclass(frozen=True)
class Failures:
    """A job and what happens to it, in seconds. between_s: mean time between failures of the whole job.

    stall_s: what a save takes from training; durable_s: from a save's begin until it counts, stall_s or more;
    restart_s: from a failure to the first step after it, loading included.
    """

    between_s: float
    stall_s: float
    durable_s: float
    restart_s: float

    def ettr(self, interval_s: float) -> float:
        """The share of time that goes into steps that count, in the long run, with so many seconds of steps between saves.

        Saves count at multiples of I + stall, later by what is written in the background. A failure at X, exponential of
        mean M, keeps I seconds of each save that counts by X: Σₖ I·P(X ≥ k·(I + stall) + durable - stall); from one
        failure to the next it is M seconds, after a restart of M·(exp(restart / M) - 1).
        """
        m = self.between_s
        if max(interval_s + self.stall_s, self.restart_s) > 700 * m:  # less than e⁻⁷⁰⁰
            return 0.0
        kept = interval_s * math.exp(-(self.durable_s - self.stall_s) / m) / math.expm1((interval_s + self.stall_s) / m)
        return kept / (m * math.exp(self.restart_s / m))

    def best_interval_s(self) -> float:
        """Seconds of steps between saves that make `ettr` largest, and that leave one save in flight at a time.

        Its derivative is 0 where I / M = 1 - exp(-(I + stall) / M); about √(2·stall·M), Young's formula.
        """
        low, high = 0.0, self.between_s
        for _ in range(100):
            middle = (low + high) / 2
            if middle / self.between_s < -math.expm1(-(middle + self.stall_s) / self.between_s):
                low = middle
            else:
                high = middle
        return max(high, self.durable_s - self.stall_s)

    def simulated(self, interval_s: float, steps_s: float, seed: int) -> float:
        """The ratio of one run that makes steps_s seconds of steps, with failures at random moments."""
        rng, wall, saved = random.Random(seed), 0.0, 0.0
        period = interval_s + self.stall_s
        while True:
            fails = rng.expovariate(1 / self.between_s)
            left = steps_s - saved
            ends = left + self.stall_s * math.floor(left / interval_s)
            if ends <= fails:
                return steps_s / (wall + ends)
            complete = math.floor((fails - self.durable_s + self.stall_s) / period)
            saved += interval_s * max(0, complete)
            wall += fails + self._restarted_s(rng)

    def _restarted_s(self, rng: random.Random) -> float:
        """From a failure to the next step; a failure during the restart begins it again."""
        spent = 0.0
        while (fails := rng.expovariate(1 / self.between_s)) < self.restart_s:
            spent += fails
        return spent + self.restart_s


def band(failures: Failures, interval_s: float, steps_s: float) -> tuple[float, float]:
    """Between what ratios 90 of 100 runs of steps_s seconds of steps end: of 400 runs, of fewer if failures are many."""
    each = 1 + steps_s / (failures.ettr(interval_s) * failures.between_s)  # failures in a run
    runs = max(20, min(400, int(1e6 / each)))
    found = sorted(failures.simulated(interval_s, steps_s, seed) for seed in range(runs))
    return found[runs // 20], found[-1 - runs // 20]
