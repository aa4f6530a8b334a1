"""A grid: one file for many recipes that differ in a few keys, such as the models and samples seen of a scaling study.

    name: study                       # runs go to runs/study
    recipe:                           # what all runs share
      optim: {lr: 1e-3}
    axes:                             # a run is named after its choices: small_3M
      model:
        small: {model.vision_width: 64}
        large: {model.vision_width: 256, optim.lr: 5e-4}
      samples:
        3M: {samples_seen: 3e6}       # becomes train.steps, by the run's global batch
    where:                            # of some choices: other values, or no run
      - {model: large, samples: 3M, skip: true}

In place of all combinations, `runs` may list those that there are, each with its choices and values: `- {model: small, samples: 3M}`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from dsclip.config.build import build_recipe
from dsclip.config.schema import BatchSection, Recipe
from dsclip.errors import UserError, did_you_mean

KEYS = ("name", "recipe", "axes", "where", "runs", "learning_rate")
SAMPLES_SEEN, DEMO_SAMPLES = "samples_seen", "demo_samples"
MAX_RUNS = 10_000  # beyond it a typing error


@dataclass(frozen=True)
class GridRun:
    """One run. choices: {axis: the choice's name}; demo_samples: of the embedded generator's data, which the sweep writes."""

    name: str
    choices: dict[str, str]
    recipe: Recipe
    demo_samples: int | None = None
    sets_lr: bool = False
    """Whether a choice of the grid says the learning rate."""


@dataclass(frozen=True)
class Grid:
    """All runs in the order of the axes. learning_rate: how it is transferred between sizes, as read; None: as the recipes say."""

    name: str
    runs: list[GridRun]
    learning_rate: dict[str, Any] | None = None


def expand(tree: Any, source: str, only: str | None = None) -> Grid:
    """The grid of a file's content, or the one run of it that is called `only`. Raises UserError that names the source and the run."""
    if not isinstance(tree, dict) or not isinstance(tree.get("axes"), dict) or not tree["axes"]:
        raise UserError(
            f"{source} is no grid; it needs `name` and `axes`, with choices and their values below each axis"
        )
    for key in tree:
        if key not in KEYS:
            raise UserError(f"{source}: a grid has no `{key}`.{did_you_mean(key, list(KEYS))} Known: {', '.join(KEYS)}")
    name, base = str(tree.get("name") or ""), tree.get("recipe") or {}
    if not name:
        raise UserError(f"{source}: give the grid a `name`; its runs go to runs/NAME")
    if "runs" in tree and "where" in tree:
        raise UserError(
            f"{source}: `runs` lists the runs, and `where` changes those of all combinations; give one of them"
        )
    axes = {axis: _choices(axis, choices, source) for axis, choices in tree["axes"].items()}
    planned = {}
    for choices, values in _combinations(tree, axes, source):
        if (run := "_".join(choices.values())) in planned:
            raise UserError(f"{source}: run {run} stands there twice")
        planned[run] = choices, values
    if not planned:
        raise UserError(f"{source}: no runs are left of its combinations")
    if only is not None and only not in planned:
        raise UserError(
            f"{source} has no run `{only}`.{did_you_mean(only, list(planned))} `python tools/sweep.py {name} --list` shows its {len(planned)}"
        )
    wanted = planned if only is None else {only: planned[only]}
    runs = [_run(name, choices, values, axes, base, source) for choices, values in wanted.values()]
    rule = tree.get("learning_rate")
    if rule is not None and not isinstance(rule, dict):
        raise UserError(f"{source}: `learning_rate` is {rule!r}; give a rule, such as {{rule: width, width: 768}}")
    return Grid(name, runs, rule)


def _choices(axis: str, choices: Any, source: str) -> dict[str, dict[str, Any]]:
    if not isinstance(choices, dict) or not choices:
        raise UserError(f"{source}: axis `{axis}` has no choices; write `NAME: {{section.key: value}}` below it")
    for name, values in choices.items():
        if not isinstance(values, dict):
            raise UserError(f"{source}: {axis} {name} is {values!r}; write its values as {{section.key: value}}")
    return choices


def _combinations(
    tree: dict[str, Any], axes: dict[str, dict[str, Any]], source: str
) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """({axis: choice}, values of this run's own) of each run."""
    if "runs" in tree:
        for row in _rows(tree, "runs", source):
            missing = [axis for axis in axes if axis not in row]
            if missing:
                raise UserError(f"{source}: {row} in `runs` has no `{missing[0]}`; a run needs a choice of every axis")
            yield _split(row, axes, source)
        return
    rules = [_split(row, axes, source) for row in _rows(tree, "where", source)]
    if len(list(product(*axes.values()))) > MAX_RUNS:
        raise UserError(f"{source}: more than {MAX_RUNS} combinations")
    for picked in product(*axes.values()):
        choices = dict(zip(axes, picked, strict=True))
        values: dict[str, Any] = {}
        for asked, given in rules:
            if asked.items() <= choices.items():
                values |= given
        if not values.pop("skip", False):
            yield choices, values


def _rows(tree: dict[str, Any], key: str, source: str) -> list[dict[str, Any]]:
    rows = tree.get(key) or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{source}: `{key}` must be a list of {{axis: choice, section.key: value}}")
    return rows


def _split(row: dict[str, Any], axes: dict[str, dict[str, Any]], source: str) -> tuple[dict[str, str], dict[str, Any]]:
    choices = {axis: str(row[axis]) for axis in axes if axis in row}
    for axis, choice in choices.items():
        if choice not in axes[axis]:
            known = list(axes[axis])
            raise UserError(
                f"{source}: {axis} has no choice `{choice}`.{did_you_mean(choice, known)} Known: {', '.join(known)}"
            )
    return choices, {key: value for key, value in row.items() if key not in axes}


def _run(
    grid: str, choices: dict[str, str], own: dict[str, Any], axes: dict[str, dict[str, Any]], base: dict[str, Any], source: str
) -> GridRun:  # fmt: skip
    name = "_".join(choices.values())
    where, tree = f"{source}, run {name}", copy.deepcopy(base)
    values: dict[str, Any] = {}
    for axis, choice in choices.items():
        values |= axes[axis][choice]
    values |= own
    seen, demo = values.pop(SAMPLES_SEEN, None), values.pop(DEMO_SAMPLES, None)
    for key, value in values.items():
        section, dot, field = key.partition(".")
        if not dot or not isinstance(tree.setdefault(section, {}), dict):
            raise UserError(
                f"{where}: `{key}` is no key of a recipe; write section.key, {SAMPLES_SEEN} or {DEMO_SAMPLES}"
            )
        tree[section][field] = value
    for key, value in ((SAMPLES_SEEN, seen), (DEMO_SAMPLES, demo)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 1):
            raise UserError(f"{where}: `{key}` is {value!r}; it must be a number above 0")
    train = tree.setdefault("train", {})
    train["name"] = name
    train.setdefault("output", f"runs/{grid}")
    if seen is not None:
        batch = tree.get("batch", {}).get("global_batch_size", BatchSection().global_batch_size)
        train["steps"] = max(1, round(seen / batch)) if isinstance(batch, int) and batch > 0 else 1
    recipe = build_recipe(tree, where)
    return GridRun(name, choices, recipe, None if demo is None else int(demo), "optim.lr" in values)
