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
    return np.asarray((_differences(a, b, compute) < 0).mean(0))


def _differences(a: FamilyFit, b: FamilyFit, compute: Array) -> Array:
    """[d, m]: ln E of b − ln E of a in each pair of draws."""
    count = min(len(a.draws), len(b.draws))
    return b.drawn(compute)[:count] - a.drawn(compute)[:count]


def _at(a: FamilyFit, b: FamilyFit, compute: float, both: tuple[float, float]) -> dict[str, Any]:
    at = np.array([compute])
    errors = [float(f.law.law.error(at)[0]) for f in (a, b)]
    share = float(ahead(a, b, at)[0])
    low, high = (float(np.exp(v)) for v in np.percentile(_differences(a, b, at)[:, 0], [2.5, 97.5]))
    return {
        "compute": float(compute), "error": {a.family: errors[0], b.family: errors[1]}, "ratio": errors[1] / errors[0],
        "ratio_ci95": [low, high], "leads": b.family if share >= 0.5 else a.family, "confidence": max(share, 1 - share),
        "extrapolated": bool(not both[0] * (1 - 1e-9) <= compute <= both[1] * (1 + 1e-9)),
    }  # fmt: skip


def _crossing(a: FamilyFit, b: FamilyFit, outer: tuple[float, float], both: tuple[float, float]) -> dict[str, Any]:
    """Where the laws meet last, within a thousandth to a thousand times what was run; who is ahead from there on, how surely.

    Where they don't meet the compute is None, and the one that `overtakes` is ahead everywhere.
    """
    grid = _spread((outer[0] / BEYOND, outer[1] * BEYOND), STEPS)
    difference = np.log(b.law.law.error(grid)) - np.log(a.law.law.error(grid))
    winner, loser = (b, a) if difference[-1] < 0 else (a, b)
    drawn = _differences(loser, winner, grid)
    met = _last_meeting(np.log10(grid), (difference if winner is b else -difference)[None])[0]
    places = _last_meeting(np.log10(grid), drawn)
    found = places[np.isfinite(places)]
    ends = [float(10**v) for v in np.percentile(found, [2.5, 97.5])] if len(found) else None
    sure, behind = (drawn < 0).mean(0) >= CONFIDENCE, (drawn > 0).mean(0) >= CONFIDENCE
    # Within the runs of either: far out the slopes of single draws alone decide.
    near = (grid >= outer[0] * (1 - 1e-9)) & (grid <= outer[1] * (1 + 1e-9))
    unsure = np.flatnonzero(near & ~sure)
    start = int(unsure[-1]) + 1 if len(unsure) else int(np.flatnonzero(near)[0])
    from_compute = float(grid[start]) if near[min(start, len(grid) - 1)] else None
    until = float(grid[np.flatnonzero(near & behind)[-1]]) if (near & behind).any() else None
    return {
        "compute": float(10**met) if np.isfinite(met) else None, "compute_ci95": ends, "overtakes": winner.family,
        "overtaken": loser.family, "confidence": float((drawn[:, near][:, -1] < 0).mean()), "ahead_with_95_from": from_compute,
        "behind_with_95_until": until, "extrapolated": bool(np.isfinite(met) and not both[0] <= 10**met <= both[1]),
    }  # fmt: skip


def _last_meeting(x: Array, difference: Array) -> Array:
    """[d]: the x from which on difference [d, m] stays below 0, between the grid's points by a line; NaN where it never changes."""
    below = difference < 0
    above = ~below
    last = np.where(above.any(-1), difference.shape[-1] - 1 - above[:, ::-1].argmax(-1), -1)
    found = np.full(len(difference), np.nan)
    for row, i in enumerate(last):
        if 0 <= i < len(x) - 1:
            d0, d1 = difference[row, i], difference[row, i + 1]
            found[row] = x[i] + (x[i + 1] - x[i]) * d0 / (d0 - d1)
    return found
