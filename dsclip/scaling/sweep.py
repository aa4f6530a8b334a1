"""A grid's runs: what each is, which are done, and one after another what is left; then the table that fits are made from.

The folder of a grid (`train.output` of its runs, runs/NAME) holds `recipes/RUN.yaml`, `states/RUN.json` of runs that did not come to
an end, the runs' own folders, and `points.csv`. A run is done when its `summary.json` is there, so that a sweep that was stopped at
any moment goes on where it was: with the run it was in, from that run's newest checkpoint.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsclip.child import run_training
from dsclip.config import Grid, GridRun, dump_recipe, load_recipe
from dsclip.datasets.demo import demo_once
from dsclip.errors import RunStopped, UserError
from dsclip.files import write_whole
from dsclip.scaling.points import named_size
from dsclip.scaling.runs import divergence, gmacs_per_sample, run_rows

VALIDATION_SAMPLES = 2  # of data that is written for training alone; evaluations use demo:val
COLUMNS = (
    "run", "status", "reason", "family", "arch", "samples_seen", "gmacs_per_sample", "gmacs_total", "train_data", "train_samples",
    "test_data", "lr", "seed", "steps",
)  # fmt: skip


@dataclass(frozen=True)
class State:
    """Of a run: done | diverged | failed | begun | open. reason: why it did not end well."""

    status: str
    reason: str = ""


class Sweep:
    """A grid in its folder."""

    def __init__(self, grid: Grid):
        folders = {run.recipe.train.output for run in grid.runs}
        if len(folders) > 1:
            raise UserError(
                f"grid {grid.name}: its runs have different `train.output`: {', '.join(sorted(folders))}; give them one"
            )
        self.folder = Path(folders.pop())
        self.grid = replace(grid, runs=[self._with_data(run) for run in grid.runs])

    def _with_data(self, run: GridRun) -> GridRun:
        if run.demo_samples is None:
            return run
        shards = str(self.folder / "data" / f"demo-{run.demo_samples}" / "train")
        return replace(run, recipe=replace(run.recipe, data=replace(run.recipe.data, train_shards=shards)))

    def run_folder(self, run: GridRun) -> Path:
        """Where a run writes."""
        return self.folder / run.name

    def state(self, run: GridRun) -> State:
        """What has become of a run so far."""
        folder, path = self.run_folder(run), self.folder / "states" / f"{run.name}.json"
        if (folder / "summary.json").is_file():
            return self._ended(run, 0)
        if path.is_file():
            return State(**json.loads(path.read_text(encoding="utf-8")))
        return State("begun" if folder.is_dir() else "open")

    def prepare(self) -> None:
        """Writes the recipes. Raises UserError when a run that has begun was another one before."""
        for run in self.grid.runs:
            path, text = self._recipe(run), dump_recipe(run.recipe)
            if path.is_file() and path.read_text(encoding="utf-8") != text:
                if self.state(run).status != "open":
                    changed = _difference(load_recipe(str(path)), run.recipe)
                    raise UserError(
                        f"{self.run_folder(run)} has begun with other values: {changed}. Give the grid another `name`, or remove that folder."
                    )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)

    def _recipe(self, run: GridRun) -> Path:
        return self.folder / "recipes" / f"{run.name}.yaml"

    def train(self, run: GridRun, launch: Sequence[str], ds_config: str) -> State:
        """Runs or continues one run. Raises RunStopped when it was asked to stop."""
        if run.demo_samples is not None:
            demo_once(self.folder / "data" / f"demo-{run.demo_samples}", run.demo_samples, VALIDATION_SAMPLES)
        # train.output may be relative to where the sweep was started; launchers/ lies in the checkout.
        overrides = [f"train.output={self.folder.resolve()}"]
        shards = run.recipe.data.train_shards
        if run.demo_samples is not None and isinstance(shards, str):
            overrides += [f"data.train_shards={Path(shards).resolve()}"]
        path = self.folder / "states" / f"{run.name}.json"
        path.unlink(missing_ok=True)
        code, asked_to_stop = run_training(launch, ds_config, str(self._recipe(run).resolve()), overrides)
        if asked_to_stop and not (self.run_folder(run) / "summary.json").is_file():
            raise RunStopped(f"{run.name} was stopped; the same command goes on with it")
        state = self._ended(run, code)
        if state.status in ("diverged", "failed"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"status": state.status, "reason": state.reason}) + "\n")
        return state

    def _ended(self, run: GridRun, code: int) -> State:
        folder = self.run_folder(run)
        if (reason := divergence(folder)) is not None:
            return State("diverged", reason)
        if (folder / "summary.json").is_file():
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            errors = summary["evaluation_errors"]
            if errors and errors[-1]["step"] == summary["steps"]:
                return State("failed", f"its last evaluation failed: {errors[-1]['error']}")
            return State("done")
        return State("failed", f"exit code {code}, and no summary.json; its lines say why")

    def rows(self) -> list[dict[str, Any]]:
        """The table: a row for each evaluation of a run that is done, and one for each run that is not. Equal grids give equal tables."""
        found: list[dict[str, Any]] = []
        for run in self.grid.runs:
            state = self.state(run)
            gmacs = gmacs_per_sample(run.recipe)
            seen = run.recipe.train.steps * run.recipe.batch.global_batch_size
            data = run.choices.get("data") or (
                f"demo-{run.demo_samples}" if run.demo_samples else str(run.recipe.data.train_shards)
            )
            base = {
                "run": run.name, "status": state.status, "reason": state.reason, "family": self.grid.name,
                "arch": run.choices.get("model") or run.recipe.model.name, "gmacs_per_sample": round(gmacs, 6), "samples_seen": seen,
                "gmacs_total": round(gmacs * seen, 3), "train_data": data, "train_samples": run.demo_samples or named_size(data),
                "lr": run.recipe.optim.lr, "seed": run.recipe.train.seed, "steps": run.recipe.train.steps,
            }  # fmt: skip
            if state.status != "done":
                found.append(base)
                continue
            for row in run_rows(self.run_folder(run)):
                found.append(base | {"test_data": row["test_data"], **{m: row[m] for m in row["metrics"]}})
        return found

    def write_table(self) -> Path:
        """points.csv, which tools/scaling_laws.py reads."""
        rows = self.rows()
        metrics = sorted({key for row in rows for key in row} - set(COLUMNS))
        text = io.StringIO()
        writer = csv.DictWriter(text, [*COLUMNS, *metrics], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "points.csv"
        write_whole(path, text.getvalue())
        return path


def sweep_all(
    sweep: Sweep, train: Callable[[GridRun], State], say: Callable[[str], None], *, only: int | None = None, at_most: int | None = None
) -> dict[str, State]:  # fmt: skip
    """Trains what is open, begun or failed, in the grid's order, and writes the table after each; {run: its state}."""
    runs, trained = sweep.grid.runs, 0
    for number, run in enumerate(runs, 1):
        before = sweep.state(run)
        if (only is not None and only != number) or before.status in ("done", "diverged"):
            continue
        if at_most is not None and trained >= at_most:
            break
        say(f"run {number} of {len(runs)}: {run.name} ({before.status})")
        state = train(run)
        trained += 1
        say(f"run {number} of {len(runs)}: {run.name} is {state.status}{': ' + state.reason if state.reason else ''}")
        sweep.write_table()
    sweep.write_table()
    return {run.name: sweep.state(run) for run in runs}


def slurm_script(sweep: Sweep, command: Sequence[str], at_a_time: int) -> str:
    """A job array: one task a run, so many at a time. What a cluster wants beside it is added to its head."""
    import shlex

    runs = len(sweep.grid.runs)
    return "\n".join([
        "#!/bin/bash",
        f"# {sweep.grid.name}: {runs} runs. Add what the cluster needs (partition, account, GPUs, time); a task that is repeated goes on",
        "# where it was, and one whose run is done ends at once.",
        f"#SBATCH --job-name={sweep.grid.name}", f"#SBATCH --array=1-{runs}%{at_a_time}",
        f"#SBATCH --output={sweep.folder}/slurm-%a.out", "#SBATCH --requeue",
        "# Before the time is up the ranks of srun are told: they save and end with exit code 75, and the task goes on in its next turn.",
        "#SBATCH --open-mode=append", "#SBATCH --signal=USR1@120",
        f"exec bash launchers/requeue.sh {shlex.join(command)} --only \"$SLURM_ARRAY_TASK_ID\"", "",
    ])  # fmt: skip


def _difference(before: Any, after: Any) -> str:
    """`section.key a → b` of the first keys that differ."""
    found = []
    for section in ("model", "data", "batch", "loss", "optim", "train", "eval"):
        old, new = vars(getattr(before, section)), vars(getattr(after, section))
        found += [f"{section}.{key} {old[key]} → {new[key]}" for key in new if old.get(key) != new[key]]
    return ", ".join(found[:3])
