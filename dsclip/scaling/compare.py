"""Two families at equal compute: how their errors differ, and from which compute on one is ahead, with confidence."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsclip.scaling.law import Array
from dsclip.scaling.study import FamilyFit

CONFIDENCE = 0.95
STEPS = 161  # of the compute at which families are compared, evenly in its logarithm
BEYOND = 1e3  # of the smallest and largest compute that either family has


def compare(a: FamilyFit, b: FamilyFit) -> dict[str, Any]:
    """`at`: errors and who leads at computes; `crossing`: where the laws meet, and where one is ahead with 95% confidence.

    Confidence is the share of draws of both laws in which it is so; the draws are those of `FamilyFit`.
    """
    both = max(a.range[0], b.range[0]), min(a.range[1], b.range[1])
    outer = min(a.range[0], b.range[0]), max(a.range[1], b.range[1])
    shown = _spread(both if both[0] < both[1] else outer, 5)
    return {
        "task": a.task, "metric": a.metric, "a": a.family, "b": b.family, "draws_from": {a.family: a.draws_from, b.family: b.draws_from},
        "common_range": list(both) if both[0] < both[1] else None,
        "at": [_at(a, b, c, both) for c in shown],
        "crossing": _crossing(a, b, outer, both),
    }  # fmt: skip


def _spread(ends: tuple[float, float], count: int) -> Array:
    return np.logspace(np.log10(ends[0]), np.log10(ends[1]), count)


def ahead(a: FamilyFit, b: FamilyFit, compute: Array) -> Array:
    """[m]: the share of draws in which b's error is below a's at each compute."""
    x = np.log10(compute)[None, :]
    count = min(len(a.draws), len(b.draws))
    lines = [f.draws[:count, :1] * x + f.draws[:count, 1:] for f in (a, b)]
    return np.asarray((lines[1] < lines[0]).mean(0))


def _at(a: FamilyFit, b: FamilyFit, compute: float, both: tuple[float, float]) -> dict[str, Any]:
    at = np.array([compute])
    errors = [float(f.power.law.error(at)[0]) for f in (a, b)]
    share = float(ahead(a, b, at)[0])
    leads = b.family if share >= 0.5 else a.family
    count = min(len(a.draws), len(b.draws))
    difference = (b.draws[:count] - a.draws[:count]) @ np.array([np.log10(compute), 1.0])
    low, high = (float(10**v) for v in np.percentile(difference, [2.5, 97.5]))
    return {
        "compute": float(compute), "error": {a.family: errors[0], b.family: errors[1]}, "ratio": errors[1] / errors[0],
        "ratio_ci95": [low, high], "leads": leads, "confidence": max(share, 1 - share),
        "extrapolated": bool(not both[0] * (1 - 1e-9) <= compute <= both[1] * (1 + 1e-9)),
    }  # fmt: skip


def _crossing(a: FamilyFit, b: FamilyFit, outer: tuple[float, float], both: tuple[float, float]) -> dict[str, Any]:
    """Where the laws meet; who is ahead above it; from which compute with confidence, None if nowhere looked at."""
    slope = a.power.law.alpha - b.power.law.alpha
    steeper = b if slope > 0 else a
    other = a if steeper is b else b
    met = float((np.log10(b.power.law.beta) - np.log10(a.power.law.beta)) / slope) if slope else np.inf
    grid = _spread((outer[0] / BEYOND, outer[1] * BEYOND), STEPS)
    sure = ahead(other, steeper, grid) >= CONFIDENCE
    # From there on for good: a draw-wise share may dip again far out, where slopes alone decide.
    unsure = np.flatnonzero(~sure)
    start = 0 if len(unsure) == 0 else int(unsure[-1]) + 1
    from_compute = float(grid[start]) if start < len(grid) else None
    before = ahead(steeper, other, grid) >= CONFIDENCE
    until = float(grid[np.flatnonzero(before)[-1]]) if before.any() else None
    count = min(len(a.draws), len(b.draws))
    slopes = other.draws[:count, 0] - steeper.draws[:count, 0]
    overtakes = slopes > 0
    places = (steeper.draws[:count, 1] - other.draws[:count, 1])[overtakes] / slopes[overtakes]
    ends = [_power(v) for v in np.percentile(places, [2.5, 97.5])] if overtakes.any() else None
    return {
        "compute": _power(met), "compute_ci95": ends, "overtakes": steeper.family, "overtaken": other.family,
        "confidence_that_it_ever_does": float(overtakes.mean()), "ahead_with_95_from": from_compute,
        "behind_with_95_until": until, "extrapolated": bool(not both[0] <= 10 ** min(met, 300.0) <= both[1]),
    }  # fmt: skip


def _power(exponent: float) -> float | None:
    """10^exponent; None where that is no compute that anybody could spend or name."""
    return float(10**exponent) if -30 < exponent < 60 else None
