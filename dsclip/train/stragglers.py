"""Which rank the others wait for: seconds of each rank's own work a step.

Collectives make whole steps equally long on all ranks, so a slow rank shows only in what it does before its first one.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from statistics import median_low

JUDGED_STEPS = 50  # at least so many steps are averaged before a rank is called slow
SLOW_SHARE = 0.1  # of a step that the others lose by waiting for it


@dataclass(frozen=True)
class OwnTime:
    """What a rank says of its last steps: seconds of own work, and of whole steps."""

    host: str
    steps: int
    own_s: float
    whole_s: float


@dataclass(frozen=True)
class SlowRank:
    """Seconds a step: a rank's own work, that of the median rank, and the whole step."""

    rank: int
    host: str
    own_s: float
    median_s: float
    step_s: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} is slow: {self.own_s:.3g} s of its own work a step before it meets the others, "
            f"against {self.median_s:.3g} s of the median rank, in steps of {self.step_s:.3g} s"
        )


class Stragglers:
    """Adds up this rank's own time, and judges that of all ranks. Deterministic: the same on all ranks."""

    def __init__(self) -> None:
        self._host = socket.gethostname()
        self._begun = False
        self._steps, self._own_s, self._whole_s = 0, 0.0, 0.0
        self._judged_steps, self._judged_s = 0, 0.0
        self._by_rank: list[float] = []

    def add(self, own_s: float, whole_s: float) -> None:
        """One step of this rank. The first of a launch doesn't count: workers start and code is compiled."""
        if self._begun:
            self._steps += 1
            self._own_s += own_s
            self._whole_s += whole_s
        self._begun = True

    def taken(self) -> OwnTime:
        """This rank's time since the last call, to be gathered."""
        time = OwnTime(self._host, self._steps, self._own_s, self._whole_s)
        self._steps, self._own_s, self._whole_s = 0, 0.0, 0.0
        return time

    def judge(self, times: list[OwnTime]) -> tuple[dict[str, float], SlowRank | None]:
        """(scalars of the steps since the last call, the slow rank when enough steps have come together). times: by rank.

        A rank is slow when its own work takes longer than the median rank's by SLOW_SHARE of a step or more. Of two ranks
        the faster is the median.
        """
        steps = times[0].steps
        if len(times) == 1 or not steps:
            return {}, None
        own = [time.own_s for time in times]
        scalars = {"own_seconds": median_low(own) / steps, "own_seconds_slowest": max(own) / steps}
        self._by_rank = [a + b for a, b in zip(self._by_rank or [0.0] * len(own), own, strict=True)]
        self._judged_steps += steps
        self._judged_s += times[0].whole_s
        if self._judged_steps < JUDGED_STEPS:
            return scalars, None
        by_rank, n, whole_s = self._by_rank, self._judged_steps, self._judged_s
        self._by_rank, self._judged_steps, self._judged_s = [], 0, 0.0
        slowest, median = max(by_rank), median_low(by_rank)
        if slowest - median < SLOW_SHARE * whole_s:
            return scalars, None
        rank = by_rank.index(slowest)
        return scalars, SlowRank(rank, times[rank].host, slowest / n, median / n, whole_s / n)
