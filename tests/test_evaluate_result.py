"""A metric is made of the values that its task returns: each reduction against a few lines of float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.evaluate import Measured, Outcomes


def reference(values, units, reduction, groups, weight) -> float:
    """Each value as often as its unit's weight says; groups with nothing don't count."""
    repeated = [(v, g) for v, u, g in zip(values, units, groups, strict=True) for _ in range(int(weight[u]))]
    if reduction == "mean":
        return sum(v for v, _ in repeated) / len(repeated)
    sums: dict[int, list[float]] = {}
    for value, group in repeated:
        sums.setdefault(group, []).append(value)
    means = [sum(v) / len(v) for v in sums.values()]
    if reduction == "gap_of_groups":
        return sum(abs(sum(v)) for v in sums.values()) / len(repeated)
    return min(means) if reduction == "worst_group" else sum(means) / len(means)


@settings(max_examples=80, deadline=None)
@given(
    reduction=st.sampled_from(["mean", "mean_of_groups", "worst_group", "gap_of_groups"]),
    units=st.integers(1, 6),
    extra=st.integers(0, 9),
    seed=st.integers(0, 10**6),
)
def test_each_reduction_of_each_resample_equals_the_repeated_values(reduction, units, extra, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.cat([torch.arange(units), torch.randint(0, units, (extra,), generator=generator)])
    values = torch.randn(len(columns), generator=generator, dtype=torch.float64)
    groups = torch.randint(0, 4, (len(columns),), generator=generator)
    weights = torch.randint(0, 3, (units, 5), generator=generator).double()
    weights[0] += 1  # a resample is never empty
    outcomes = Outcomes(values, columns, reduction, None if reduction == "mean" else groups)
    parts = (values.tolist(), columns.tolist(), reduction, groups.tolist())
    expected = [reference(*parts, weights[:, b]) for b in range(5)]
    assert outcomes.statistic(weights, columns).tolist() == pytest.approx(expected)
    assert outcomes.value() == pytest.approx(reference(*parts, torch.ones(units)))


def test_units_become_the_numbers_of_the_samples():
    measured = Measured({"top1": Outcomes(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 1, 1]))}, {"samples": 2})
    found = measured.of_samples([5, 9])
    assert found.outcomes["top1"].units.tolist() == [5, 9, 9] and found.metrics == {"top1": 2 / 3, "samples": 2}
