"""Points of one's own runs, from the folders that they leave: summary.json, config.yaml and metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from dsclip.config import Recipe, load_recipe
from dsclip.errors import UserError
from dsclip.model import ClipConfig, resolve_preset
from dsclip.model.flops import forward_flops
from dsclip.scaling.points import LeftOut, Point, Table

COUNTS = ("classes", "samples", "images", "texts", "pairs", "candidates")  # results that say how many, not how well
# Of ln N, the loss of guessing among N: a run that was below the first and ends above the second lost what it had learnt; one that
# ends above the third is worse than guessing. In between is a run that was too short to learn.
LEARNT, LOST, WORSE = 0.9, 0.98, 1.1
LAST = 5  # logged steps, whose median loss is that of a run's end


def read_runs(folder: Path, family: str = "runs") -> Table:
    """The points of a run's folder, or of all runs in a folder; runs that diverged or did not end are left out and named.

    Raises UserError where there are no runs.
    """
    runs = [folder] if (folder / "config.yaml").is_file() else sorted(p.parent for p in folder.glob("*/config.yaml"))
    if not runs:
        raise UserError(f"{folder} holds no runs: neither config.yaml, as a run writes it, nor folders that do")
    table = Table()
    for run in runs:
        reason = left_out(run)
        if reason is None:
            table.points += run_points(run, family)
        else:
            table.left_out.append(LeftOut(run.name, reason))
    return table


def left_out(run: Path) -> str | None:
    """Why no fit may use a run; None where one may."""
    if (reason := divergence(run)) is not None:
        return f"diverged: {reason}"
    return None if (run / "summary.json").is_file() else "it has not ended: no summary.json"


def divergence(run: Path) -> str | None:
    """How a run's loss shows that it diverged: not finite at its end, or back at that of guessing; None otherwise."""
    path = run / "metrics.jsonl"
    logged = [] if not path.is_file() else [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [entry for entry in logged if "loss" in entry]
    if not steps:
        return None
    last = steps[-1]["step"]
    if steps[-1]["loss"] is None or not math.isfinite(steps[-1]["loss"]):
        return f"its loss is not finite at step {last}"
    if all("skip_reason" in entry for entry in steps[-LAST:]):
        return f"its last steps were skipped, not finite: {steps[-1]['skip_reason']}"
    recipe = load_recipe(str(run / "config.yaml"))
    if recipe.loss.name != "softmax":
        return None
    losses = [entry["loss"] for entry in steps if entry["loss"] is not None]
    guessing, end, best = math.log(recipe.batch.global_batch_size), median(losses[-LAST:]), min(losses)
    if best < LEARNT * guessing and end > LOST * guessing:
        return f"its loss fell to {best:.3f} and is {end:.3f} at step {last}; {guessing:.3f} is that of guessing"
    if end > max(WORSE * guessing, losses[0]):
        return f"its loss rose from {losses[0]:.3f} to {end:.3f} at step {last}; {guessing:.3f} is that of guessing"
    return None


def run_points(run: Path, family: str) -> list[Point]:
    """A point for every metric of every evaluation at a run's end."""
    return [
        Point(family, row["test_data"], metric, row["gmacs_total"], 1 - row[metric], row["arch"], row["gmacs_per_sample"],
              row["samples_seen"], row["train_data"], None, run.name, row["lr"])
        for row in run_rows(run) for metric in row["metrics"] if row[metric] < 1
    ]  # fmt: skip


def run_rows(run: Path) -> list[dict[str, Any]]:
    """{column: value} for each evaluation at a run's end, with the names of its metrics in `metrics`."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    recipe = load_recipe(str(run / "config.yaml"))
    gmacs = gmacs_per_sample(recipe)
    rows = []
    for task, results in summary["eval"].items():
        metrics = {k: v for k, v in results.items() if isinstance(v, float) and 0 <= v <= 1 and k not in COUNTS}
        rows.append({
            "arch": recipe.model.name, "samples_seen": summary["samples"], "gmacs_per_sample": gmacs,
            "gmacs_total": gmacs * summary["samples"], "train_data": _named(recipe.data.train_shards), "test_data": task,
            "lr": recipe.optim.lr, "seed": recipe.train.seed, "steps": summary["steps"], "seconds": summary["seconds"],
            "metrics": list(metrics), **metrics,
        })  # fmt: skip
    return rows


def gmacs_per_sample(recipe: Recipe) -> float:
    """Of a forward of both towers, with captions of the whole context, as the study counts."""
    return sum(forward_flops(model_of(recipe))) / 2e9


def model_of(recipe: Recipe) -> ClipConfig:
    """The recipe's model, without its tokenizer's vocabulary, which no product depends on."""
    return resolve_preset(recipe.model.preset, **recipe.model.overrides)


def _named(shards: str | Sequence[str]) -> str:
    return shards if isinstance(shards, str) else "::".join(shards)
