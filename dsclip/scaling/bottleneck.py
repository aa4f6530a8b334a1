"""Where growing one thing alone stops paying: model, data and samples seen, each varied with the two others held."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsclip.scaling.law import line
from dsclip.scaling.points import Point

SAME = 1.15  # sizes whose ratio is below it are the same one: runs end at whole epochs
FACTORS = ("model", "data", "samples_seen")
SHARE = 0.5  # of the law's exponent: a factor that gives less is held back by those that are held


@dataclass(frozen=True)
class Series:
    """Runs that differ in one factor. sizes [m], rising: GMACs a sample, data set samples, or samples seen; errors [m]."""

    varied: str
    held: dict[str, str]
    names: list[str]
    sizes: list[float]
    errors: list[float]

    @property
    def exponent(self) -> float:
        """Slope of log E against log size."""
        return float(line(np.log(np.array(self.sizes)), np.log(np.array(self.errors)))[0])

    @property
    def last(self) -> float:
        """The exponent between the two largest sizes."""
        return math.log(self.errors[-1] / self.errors[-2]) / math.log(self.sizes[-1] / self.sizes[-2])

    def described(self, alpha: float) -> dict[str, Any]:
        """As JSON. alpha: the family's exponent in compute, which model and samples seen would have along its law."""
        share = self.last / alpha if alpha < 0 and self.varied != "data" else None
        held_back = self.last >= 0 if share is None else share < SHARE
        return {
            "varied": self.varied, "held": self.held, "names": self.names, "sizes": self.sizes, "errors": self.errors,
            "exponent": self.exponent, "last_exponent": self.last, "share_of_law": share, "bottleneck": held_back,
        }  # fmt: skip


def series(points: Sequence[Point]) -> list[Series]:
    """All series of at least two sizes among the points of one family and task, the best run of equal ones."""
    known = [p for p in points if p.samples_seen and p.gmacs_per_sample and p.model]
    scales = _scales([p.samples_seen or 0 for p in known])
    found = []
    for varied in FACTORS:
        groups: dict[tuple[str, ...], dict[str, Point]] = {}
        for p in known:
            names = {"model": p.model, "data": p.data, "samples_seen": scales[p.samples_seen or 0]}
            held = tuple(names[f] for f in FACTORS if f != varied)
            best = groups.setdefault(held, {})
            if names[varied] not in best or p.error < best[names[varied]].error:
                best[names[varied]] = p
        for held, runs in groups.items():
            sized = sorted((size, name, p.error) for name, p in runs.items() if (size := _size(p, varied)))
            if len({size for size, _, _ in sized}) == len(sized) > 1:
                names = dict(zip((f for f in FACTORS if f != varied), held, strict=True))
                sizes, labels, errors = zip(*sized, strict=True)
                found.append(Series(varied, names, list(labels), list(sizes), list(errors)))
    return found


def _size(point: Point, factor: str) -> float | None:
    return {"model": point.gmacs_per_sample, "data": point.data_samples, "samples_seen": point.samples_seen}[factor]


def _scales(sizes: Sequence[float]) -> dict[float, str]:
    """{size: the name of its scale}: sizes next to each other within 15% share one."""
    found: dict[float, str] = {}
    group: list[float] = []
    for size in sorted(set(sizes)):
        if group and size > SAME * group[-1]:
            group = []
        group.append(size)
        name = short(math.exp(sum(map(math.log, group)) / len(group)))
        found |= dict.fromkeys(group, name)
    return found


def short(size: float) -> str:
    """13.1e9 as 13B, in two digits."""
    rounded = float(f"{size:.2g}")
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if rounded >= unit:
            return f"{rounded / unit:g}{name}"
    return f"{rounded:g}"
