"""Which of many runs say what the best possible error at a compute is: all, the Pareto front, or the study's bins."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dsclip.scaling.law import Array

Method = Literal["study", "pareto", "all"]
BINS = 5
BIN_MARGIN = 0.1  # by which the study's range goes beyond the largest log10 C
FEW = 10  # runs, below which `auto` takes them all: bins of one or two runs have no best of many


def method_for(runs: int) -> Method:
    """What the study does: its bins for the many runs of OpenCLIP, all points for OpenAI's three."""
    return "study" if runs >= FEW else "all"


def pareto(compute: Array, error: Array) -> NDArray[np.intp]:
    """Indices of the runs that none with at most their compute beats, by rising compute."""
    order = np.lexsort((error, compute))
    best = np.minimum.accumulate(np.concatenate([[np.inf], error[order][:-1]]))
    return order[error[order] < best]


def select(x: Array, y: Array, method: Method) -> tuple[Array, Array, Array]:
    """(x, y, weights) [b, m] that a law is fitted through, of b sets of runs x = log10 C, y = log10 E, both [b, n].

    study: the lowest error in each of five equal bins of x, at the bin's centre, from the smallest x to the largest + 0.1; bins
    without runs weigh 0 (Cherti et al. 2023, released figures notebook). pareto: the runs on the front. all: every run.
    """
    if method == "study":
        low, width = x.min(-1, keepdims=True), np.ptp(x, axis=-1)[:, None] + BIN_MARGIN
        inside = np.clip(np.floor((x - low) / width * BINS), 0, BINS - 1)
        lowest = np.stack([np.where(inside == b, y, np.inf).min(-1) for b in range(BINS)], -1)
        used = np.isfinite(lowest)
        return low + width * (np.arange(BINS) + 0.5) / BINS, np.where(used, lowest, 0.0), used.astype(np.float64)
    if method == "pareto":
        order = np.lexsort((y, x), axis=-1)
        x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
        before = np.minimum.accumulate(np.concatenate([np.full((len(y), 1), np.inf), y[:, :-1]], -1), axis=-1)
        return x, y, (y < before).astype(np.float64)
    return x, y, np.ones_like(y)


def selected(compute: Array, error: Array, method: Method) -> tuple[Array, Array]:
    """(compute, error) [m] of the points that a law is fitted through, of one set of runs [n]."""
    x, y, weights = select(np.log10(compute)[None], np.log10(error)[None], method)
    used = weights[0] > 0
    return 10 ** x[0, used], 10 ** y[0, used]
