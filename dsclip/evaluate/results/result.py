"""What a task returns: its metrics, and the values they are made of, so that intervals and comparisons need no task's help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

# How values become a metric: their mean; the mean, or the smallest, of the means of groups; the sum over groups of how far
# the values of each are off together, a share of all (of correct - confidence, grouped by confidence: calibration error).
# mean_average_precision: values are relevances, 1 or 0, each group's in the order of its ranking.
# macro_f1: values are 1 for a hit, 0 for a miss of the group, -1 for what was wrongly taken for it (see `macro_f1`).
Reduction = Literal["mean", "mean_of_groups", "worst_group", "gap_of_groups", "mean_average_precision", "macro_f1"]

MOST_GROUPS = 20  # that are reported one by one


@dataclass(frozen=True)
class Outcomes:
    """One metric's values. values [n]; units [n] int64: the sample of the set that each is of; groups [n] int64, from 0.

    Values of one unit are drawn together in a bootstrap: the captions of an image, the pairs of an image.
    """

    values: Tensor
    units: Tensor
    reduction: Reduction = "mean"
    groups: Tensor | None = None

    def value(self) -> float:
        """The metric, in float64."""
        columns = torch.zeros_like(self.units)  # as if there were one unit, drawn once
        return self.statistic(torch.ones(1, 1, dtype=torch.float64), columns).item()

    def statistic(self, weights: Tensor, columns: Tensor) -> Tensor:
        """The metric [B] of B resamples: weights [units, B] say how often each unit is in, columns [n] which row is a value's.

        Groups that a resample has nothing of don't count in it. NaN for a resample that has no value at all.
        """
        count, values = weights[columns], self.values.to(weights.dtype)[:, None]
        if self.groups is None:
            return (count * values).sum(dim=0) / count.sum(dim=0)
        if self.reduction == "mean_average_precision":
            return self._average_precision(weights, columns, self.groups)
        if self.reduction == "macro_f1":
            return self._macro_f1(count, self.groups)
        groups = int(self.groups.max()) + 1
        sums = weights.new_zeros(groups, weights.shape[1]).index_add_(0, self.groups, count * values)
        counts = weights.new_zeros(groups, weights.shape[1]).index_add_(0, self.groups, count)
        if self.reduction == "gap_of_groups":
            return sums.abs().sum(dim=0) / counts.sum(dim=0)
        if self.reduction == "worst_group":
            return (sums / counts).nan_to_num(nan=torch.inf).amin(dim=0)
        return (sums / counts).nansum(dim=0) / (counts > 0).sum(dim=0)

    def _average_precision(self, weights: Tensor, columns: Tensor, groups: Tensor) -> Tensor:
        """The precision at each relevant value, averaged over a group's, then over groups; a sample that is drawn twice stands at one place."""
        of_groups = []
        for group in range(int(groups.max()) + 1):
            inside = groups == group
            drawn = weights[columns[inside]]
            relevant = drawn * self.values[inside].to(weights.dtype)[:, None]
            precision = relevant.cumsum(dim=0) / drawn.cumsum(dim=0).clamp(min=1)
            of_groups.append((relevant * precision).sum(dim=0) / relevant.sum(dim=0))
        return torch.stack(of_groups).nanmean(dim=0)

    def _macro_f1(self, count: Tensor, groups: Tensor) -> Tensor:
        """The mean of 2 hits / (2 hits + misses + wrongly taken) over the groups that have a hit or a miss, that is a sample of their own."""
        zeros = count.new_zeros(int(groups.max()) + 1, count.shape[1])
        hits, misses, taken = (
            zeros.index_add(0, groups[self.values == kind], count[self.values == kind]) for kind in (1, 0, -1)
        )
        present = hits + misses > 0
        f1 = torch.where(present, 2 * hits / (2 * hits + misses + taken), 0)
        return f1.sum(dim=0) / present.sum(dim=0)


def macro_f1(predicted: Tensor, labels: Tensor) -> Outcomes:
    """The mean over classes of the harmonic mean of precision and recall: predicted, labels [n] int64.

    Only classes that a sample is of count, whatever else is predicted, as in WILDS (Koh et al. 2021). Units are places in `labels`.
    """
    right, rows = predicted == labels, torch.arange(len(labels))
    wrong = ~right
    values = torch.cat([right.float(), -torch.ones(int(wrong.sum()))])
    return Outcomes(values, torch.cat([rows, rows[wrong]]), "macro_f1", torch.cat([labels, predicted[wrong]]))


@dataclass(frozen=True)
class Measured:
    """A task's result. outcomes: {metric: its values}, of which `metrics` are made; counts: what has no interval, such as n."""

    outcomes: Mapping[str, Outcomes]
    counts: Mapping[str, int | float]

    @property
    def metrics(self) -> dict[str, float]:
        """{metric: value}, shares in 0..1, then the counts."""
        return {name: outcomes.value() for name, outcomes in self.outcomes.items()} | dict(self.counts)

    def of_samples(self, indices: Sequence[int]) -> Measured:
        """The same with units that are rows of features replaced by the numbers of the samples in these rows."""
        numbers = torch.tensor(indices, dtype=torch.int64)
        outcomes = {name: replace(found, units=numbers[found.units]) for name, found in self.outcomes.items()}
        return replace(self, outcomes=outcomes)


def by_group(
    name: str, outcomes: Outcomes, groups: Sequence[str | None], *, worst: bool = False
) -> dict[str, Outcomes]:
    """A metric's mean over the parts of a set, and, if they are few, each part's: groups [n] names them, None is of none.

    worst: also that of the worst part. {} where there are fewer than two parts.
    """
    names = sorted({group for group in groups if group is not None})
    if len(names) < 2:
        return {}
    number = {group: i for i, group in enumerate(names)}
    of_value = torch.tensor([-1 if group is None else number[group] for group in groups])
    within = of_value >= 0
    found = {
        f"{name}_mean_of_groups": replace(
            outcomes, values=outcomes.values[within], units=outcomes.units[within], reduction="mean_of_groups", groups=of_value[within]
        )
    }  # fmt: skip
    if worst:
        found[f"{name}_worst_group"] = replace(found[f"{name}_mean_of_groups"], reduction="worst_group")
    for group, i in number.items() if len(names) <= MOST_GROUPS else ():
        of_group = of_value == i
        found[f"{name}_{group}"] = replace(outcomes, values=outcomes.values[of_group], units=outcomes.units[of_group])
    return found
