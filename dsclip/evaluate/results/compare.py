"""Results side by side: what differs in how they were measured, and which differences of metrics are more than chance.

Differences are tested on the same bootstrap resamples of the same samples (a paired bootstrap, Efron & Tibshirani 1993,
chapter 16; as Koehn 2004 does for translation): what makes a sample hard for both models doesn't blur their difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsclip.errors import UserError
from dsclip.evaluate.results.intervals import Interval, bootstrap, interval
from dsclip.evaluate.results.record import Record

# Of the models themselves: models that differ in these are what a comparison is for. It is said, not refused.
OF_THE_MODEL = ("model", "image", "text", "precision", "versions")


@dataclass(frozen=True)
class Difference:
    """One metric of a result against the first one's. p: two-sided, of no difference at all, not below 1 / resamples."""

    difference: float
    interval: Interval
    p: float


@dataclass(frozen=True)
class Row:
    """One metric: each result's value, and what lies between each and the first."""

    metric: str
    values: list[float]
    differences: list[Difference]


def compare(records: Sequence[Record]) -> list[Row]:
    """A row for each metric that all results have. Raises UserError when they are not of the same samples, or share no metric."""
    shared = [name for name in records[0].outcomes if all(name in record.outcomes for record in records)]
    if not shared:
        raise UserError(f"{' and '.join(str(record.path) for record in records)} have no metric in common")
    rows = []
    for name in shared:
        outcomes = [record.outcomes[name] for record in records]
        if len({found.reduction for found in outcomes}) > 1:
            raise UserError(f"{name} is computed otherwise in some of these results; evaluate again with one version")
        resamples = bootstrap(outcomes)
        values = [found.value() for found in outcomes]
        differences = [
            Difference(value - values[0], interval(drawn - resamples[0]), p_value(drawn - resamples[0]))
            for value, drawn in zip(values[1:], resamples[1:], strict=True)
        ]
        rows.append(Row(name, values, differences))
    return rows


def p_value(differences: Tensor) -> float:
    """How often resamples contradict the sign of the difference, twice; 1 where there is no difference in any."""
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(differences)))


def differing(records: Sequence[Record]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """({field: its values} that make results incomparable, {field: its values} that belong to the models), by dotted names."""
    flat = [_flat({"task": record.result["task"], "protocol": record.result["protocol"]}) for record in records]
    names = sorted({name for fields in flat for name in fields})
    found = {name: [fields.get(name) for fields in flat] for name in names}
    found = {
        name: values
        for name, values in found.items()
        # Where a set lies, and in which format, is no difference as long as its texts are the same.
        if any(value != values[0] for value in values)
        and name not in ("data.name", "data.split", "data.manifest_sha256")
    }
    of_models = {name: values for name, values in found.items() if name.split(".")[0] in OF_THE_MODEL}
    return {name: values for name, values in found.items() if name not in of_models}, of_models


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, "" if name == "protocol" else f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
