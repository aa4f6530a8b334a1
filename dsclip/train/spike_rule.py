"""When a loss has jumped: a rule on two numbers of each step, the same on all ranks because the numbers are.

A number deviates when it lies above the median of the last `window` steps by more than `threshold` robust standard deviations,
1.4826·MAD of the same steps (Hampel 1974): unlike mean and standard deviation, up to half of them may be outliers. The numbers
are the loss and the logarithm of the gradient norm, whose noise is multiplicative.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import TypedDict

TO_DEVIATION = 1.4826  # of a normal distribution's median absolute deviation
# A plateau has hardly any noise: rises below `threshold` times this share of the loss, or of the norm, are no deviation.
LEAST_DEVIATION = 0.01
WITHIN = 10  # steps in which two must deviate: one alone is a batch that differs
LEAD = 8  # steps before the first that may have caused it: spikes come 1 to 8 steps after their cause (Wortsman et al. 2023)


class RuleState(TypedDict):
    """As a checkpoint holds it. deviating: steps of the last WITHIN: step, loss, the usual one, deviations of the loss."""

    losses: list[float]
    log_norms: list[float]
    deviating: list[tuple[int, float, float, float]]
    told: bool


@dataclass(frozen=True)
class Spike:
    """Steps first … last, of which the first deviated and the last decided it.

    worst: the one of them whose loss deviated most, by so many deviations. loss: its loss; usual: the median of those before it.
    """

    first: int
    last: int
    worst: int
    loss: float
    usual: float
    deviations: float

    def __str__(self) -> str:
        return (
            f"the loss jumped in steps {self.first} to {self.last}: {self.loss:.4g} in step {self.worst}, where {self.usual:.4g} was "
            f"usual ({self.deviations:.3g} robust standard deviations)"
        )


class SpikeRule:
    """Judges one step after the other: a spike is two steps within ten that deviate, at least one of them by its loss.

    Nothing is judged before `window` steps are known. A jump that lasts is told once; after half a window it is usual.
    """

    def __init__(self, window: int, threshold: float, state: RuleState | None = None):
        self._window, self._threshold = window, threshold
        self._losses: deque[float] = deque(state["losses"] if state else (), maxlen=window)
        self._log_norms: deque[float] = deque(state["log_norms"] if state else (), maxlen=window)
        # A step of which an earlier version kept no figures is forgotten.
        known = [figures for figures in state["deviating"] if len(figures) == 4] if state else []
        self._deviating = [(step, loss, usual, by_loss) for step, loss, usual, by_loss in known]
        self._told = state["told"] if state else False

    def state(self) -> RuleState:
        """What the rule goes on with after a resume."""
        return {
            "losses": list(self._losses),
            "log_norms": list(self._log_norms),
            "deviating": list(self._deviating),
            "told": self._told,
        }

    def judge(self, step: int, loss: float, grad_norm: float) -> Spike | None:
        """The spike that this step, counted from 1, makes certain. grad_norm: NaN where there is none, which never deviates."""
        log_norm = math.log(grad_norm) if grad_norm > 0 else math.nan
        usual, by_loss, by_norm = math.nan, math.nan, math.nan
        if len(self._losses) == self._window:
            usual = median(self._losses)
            by_loss = deviations(loss, self._losses, LEAST_DEVIATION * abs(usual))
            by_norm = deviations(log_norm, self._log_norms, LEAST_DEVIATION)
        self._losses.append(loss)
        if not math.isnan(log_norm):
            self._log_norms.append(log_norm)
        self._deviating = [figures for figures in self._deviating if figures[0] > step - WITHIN]
        if by_loss > self._threshold or by_norm > self._threshold:
            self._deviating.append((step, loss, usual, by_loss))
        self._told = self._told and bool(self._deviating)
        of_loss = [figures for figures in self._deviating if figures[3] > self._threshold]
        if self._told or len(self._deviating) < 2 or not of_loss:
            return None
        self._told = True
        return Spike(self._deviating[0][0], step, *max(of_loss, key=lambda figures: figures[3]))


def deviations(x: float, before: Iterable[float], least: float) -> float:
    """How many robust standard deviations x lies above the median of `before`; NaN without any. least: the smallest deviation."""
    values = list(before)
    if not values:
        return math.nan
    middle = median(values)
    spread = TO_DEVIATION * median([abs(value - middle) for value in values])
    return (x - middle) / max(spread, least, math.ulp(0.0))
