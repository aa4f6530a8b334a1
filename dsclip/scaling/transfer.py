"""Learning rates of a grid that follow from fewer: by width, as μP's rule has it, or from sweeps at smaller sizes.

learning_rate: {rule: width, lr: 1e-3, width: 768}                       # lr at that width of the image tower
learning_rate: {rule: measured, points: runs/lr/points.csv, metric: top1, task: zeroshot}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from dsclip.config import Grid, GridRun, Recipe
from dsclip.errors import UserError, did_you_mean
from dsclip.scaling.law import line
from dsclip.scaling.points import Point, read_csv
from dsclip.scaling.runs import gmacs_per_sample, model_of

RULES: dict[str, tuple[set[str], set[str]]] = {  # (keys that are needed, keys that may be there)
    "width": ({"lr", "width"}, {"exponent"}),
    "measured": ({"points"}, {"metric", "task"}),
}
MUP_EXPONENT = -1.0  # of Adam's learning rate for hidden matrices, Yang et al. 2022, table 8; here of all parameters


def transferred(grid: Grid) -> Grid:
    """The grid with the learning rates of its rule; as it is where it has none. Raises UserError."""
    if grid.learning_rate is None:
        return grid
    rule = dict(grid.learning_rate)
    name = rule.pop("rule", None)
    if name not in RULES:
        raise UserError(f"grid {grid.name}: `learning_rate.rule` is {name!r}; choose from {', '.join(RULES)}")
    needed, allowed = RULES[name]
    for key in rule:
        if key not in needed | allowed:
            raise UserError(
                f"grid {grid.name}: the rule {name} has no `{key}`.{did_you_mean(key, sorted(needed | allowed))} "
                f"Known: {', '.join(sorted(needed | allowed))}"
            )
    if missing := sorted(needed - set(rule)):
        raise UserError(f"grid {grid.name}: `learning_rate` with the rule {name} needs `{missing[0]}`")
    if setting := next((run.name for run in grid.runs if run.sets_lr), None):
        raise UserError(
            f"grid {grid.name}: run {setting} sets optim.lr, and so does `learning_rate`; leave one of them out"
        )
    rate = _by_width(grid.name, rule) if name == "width" else _measured(grid.name, rule)
    return replace(grid, runs=[_with(run, rate(run.recipe)) for run in grid.runs], learning_rate=None)


def _with(run: GridRun, lr: float) -> GridRun:
    optim = run.recipe.optim
    if lr < optim.min_lr:
        raise UserError(
            f"run {run.name}: its transferred learning rate {lr:g} is below `optim.min_lr` {optim.min_lr:g}"
        )
    return replace(run, recipe=replace(run.recipe, optim=replace(optim, lr=lr)))


def _by_width(grid: str, rule: dict[str, Any]) -> Callable[[Recipe], float]:
    lr, width, exponent = (_number(grid, key, rule.get(key, MUP_EXPONENT)) for key in ("lr", "width", "exponent"))
    if lr <= 0 or width <= 0:
        raise UserError(f"grid {grid}: `learning_rate.lr` and `learning_rate.width` must be above 0")
    return lambda recipe: _rounded(lr * (model_of(recipe).vision_width / width) ** exponent)


def _measured(grid: str, rule: dict[str, Any]) -> Callable[[Recipe], float]:
    """lr*(G) = k·G^q through the best learning rate of each size in the points of earlier runs."""
    points = [
        p for p in read_csv(str(rule["points"])).points
        if p.lr and p.gmacs_per_sample and rule.get("metric") in (None, p.metric) and rule.get("task") in (None, p.task)
    ]  # fmt: skip
    kinds = {(p.task, p.metric) for p in points}
    if len(kinds) != 1:
        found = (
            ", ".join(f"{task} {metric}" for task, metric in sorted(kinds)) or "none with `lr` and `gmacs_per_sample`"
        )
        raise UserError(
            f"grid {grid}: {rule['points']} must give one metric of one task ({found}); set `metric` and `task`"
        )
    sizes: dict[float, list[Point]] = {}
    for p in points:
        sizes.setdefault(p.gmacs_per_sample or 0, []).append(p)
    best = sorted((gmacs, best_rate(runs)) for gmacs, runs in sizes.items() if len({p.lr for p in runs}) > 1)
    if not best:
        raise UserError(f"grid {grid}: {rule['points']} holds no size of model with two learning rates")
    x, y = np.log(np.array(best)).T
    slope, intercept = line(x, y) if len(best) > 1 else (np.float64(0), y[0])
    return lambda recipe: _rounded(float(np.exp(intercept + slope * np.log(gmacs_per_sample(recipe)))))


def best_rate(runs: list[Point]) -> float:
    """Where the parabola through the best learning rate and its neighbours, log error against log rate, is lowest.

    The best of the runs where it lies at an end of them, or is one of two.
    """
    lowest: dict[float, float] = {}
    for p in runs:
        lowest[p.lr or 0] = min(p.error, lowest.get(p.lr or 0, np.inf))
    rates = sorted(lowest)
    at = int(np.argmin([lowest[rate] for rate in rates]))
    if not 0 < at < len(rates) - 1:
        return rates[at]
    near = rates[at - 1 : at + 2]
    a, b, _ = np.polyfit(np.log(near), np.log([lowest[rate] for rate in near]), 2)
    return float(np.exp(-b / (2 * a))) if a > 0 else rates[at]


def _number(grid: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"grid {grid}: `learning_rate.{key}` is {value!r}; it must be a number")
    return float(value)


def _rounded(rate: float) -> float:
    """Three digits: what follows says nothing, and is long to read."""
    return float(f"{rate:.3g}")
