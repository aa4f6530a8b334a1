"""95% bootstrap intervals of metrics: samples are drawn again with replacement, what belongs to one sample together.

Source: Efron & Tibshirani 1993, chapter 13 (percentile interval); captions of an image as a cluster, Field & Welsh 2007.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsclip.errors import UserError
from dsclip.evaluate.results.result import Measured, Outcomes

RESAMPLES = 1000
SEED = 0
NUMBERS_AT_ONCE = 1 << 20  # of weights: 8 MB
STRENGTHS = ("regularisation",)  # numbers beside the metrics that are no shares
CI95 = "_ci95"  # what a metric's interval is called beside it
Interval = tuple[float, float]


def with_intervals(measured: Measured) -> dict[str, float | list[float]]:
    """The metrics as JSON has them: {metric: value, metric_ci95: [lower, upper]}, then the counts."""
    found = intervals(measured)
    metrics: dict[str, float | list[float]] = {}
    for name, value in measured.metrics.items():
        metrics[name] = value
        if name in found:
            metrics[name + CI95] = list(found[name])
    return metrics


def table(metrics: Mapping[str, float | list[float]], digits: int = 2) -> list[tuple[str, str, str]]:
    """(metric, value, its interval or "") as people read them, of `with_intervals`; digits: of percentages."""
    rows = []
    for name, value in metrics.items():
        if isinstance(value, list):
            continue
        between = metrics.get(name + CI95)
        share = isinstance(value, float) and name not in STRENGTHS
        shown = f"{value:.{digits}%}" if share else f"{value:.3g}" if name in STRENGTHS else str(value)
        ends = " – ".join(f"{end:.{digits}%}" for end in between) if isinstance(between, list) else ""
        rows.append((name, shown, ends))
    return rows


def intervals(measured: Measured) -> dict[str, Interval]:
    """{metric: (lower, upper)} in which 95% of the resamples' metrics lie; the same numbers at every call.

    A metric that is the same in every resample, such as 100 %, has an interval without width.
    """
    return {name: interval(bootstrap([outcomes])[0]) for name, outcomes in measured.outcomes.items()}


def interval(values: Tensor) -> Interval:
    """The 2.5th and 97.5th percentile of the values [B] of resamples."""
    low, high = values.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def bootstrap(results: Sequence[Outcomes], resamples: int = RESAMPLES) -> Tensor:
    """float64 [results, resamples]: one metric of several models, all on the same resamples of the same samples.

    Samples that contribute the same to every result are drawn together: how many of them a resample has is multinomial, so
    that 50,000 samples of which each is right or wrong take no longer than two. Raises UserError when the samples differ.
    """
    units = results[0].units.unique()
    if any(not torch.equal(found.units.unique(), units) for found in results):
        raise UserError("these results are not of the same samples: they can't be compared pair by pair")
    columns = [torch.searchsorted(units, found.units) for found in results]
    alike = _alike(results, columns, len(units))
    _, first, kind, counts = np.unique(alike, return_index=True, return_inverse=True, return_counts=True)
    kept, places = [], []  # the values of one sample of each kind
    for found, column in zip(results, columns, strict=True):
        column_kind = torch.from_numpy(kind)[column]
        of_first = torch.from_numpy(first)[column_kind] == column
        groups = None if found.groups is None else found.groups[of_first]
        kept.append(replace(found, values=found.values[of_first], units=found.units[of_first], groups=groups))
        places.append(column_kind[of_first])
    parts = [
        torch.stack([found.statistic(weights, place) for found, place in zip(kept, places, strict=True)])
        for weights in _weights(counts, resamples)
    ]
    return torch.cat(parts, dim=1).double()


def _weights(counts: NDArray[np.int64], resamples: int) -> Iterator[Tensor]:
    """[kinds, b] for some b at a time: how many samples of each kind, of which there are `counts`, a resample has."""
    generator, total = np.random.default_rng(SEED), int(counts.sum())
    many = len(counts) * 4 > total  # kinds: multinomial numbers would take longer than to draw the samples
    kind = np.repeat(np.arange(len(counts)), counts)
    at_once = max(1, NUMBERS_AT_ONCE // len(counts))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        if many:
            drawn = np.empty((size, len(counts)), np.float32)
            for row in drawn:
                draws = kind[generator.integers(0, total, total, dtype=np.uint32)]
                row[:] = np.bincount(draws, minlength=len(counts))
        else:
            drawn = generator.multinomial(total, counts / total, size).astype(np.float64)
        yield torch.from_numpy(drawn).T.contiguous()


def _alike(results: Sequence[Outcomes], columns: Sequence[Tensor], units: int) -> NDArray[np.uint64]:
    """uint64 [units]: equal for samples with the same values in the same groups of each result, in whatever order."""
    alike = np.zeros(units, np.uint64)
    for found, column in zip(results, columns, strict=True):
        value = _mixed(found.values.double().numpy().view(np.uint64))
        if found.groups is not None:
            value = _mixed(value + found.groups.numpy().astype(np.uint64))
        if found.reduction == "mean_average_precision":  # whose values count by their places: no two samples are alike
            value = _mixed(value + np.arange(len(value)).astype(np.uint64))
        of_unit = np.zeros(units, np.uint64)
        np.add.at(of_unit, column.numpy(), value)  # modulo 2^64
        alike = _mixed(alike) + of_unit
    return alike


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of each number (splitmix64), so that sums of several are equal only where all are."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
