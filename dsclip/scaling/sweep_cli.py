"""The command line of tools/sweep.py."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsclip.command_line import parser, run_tool, say
from dsclip.config import GridRun, load_grid, packaged_grids
from dsclip.errors import UserError
from dsclip.files import write_whole
from dsclip.scaling.bottleneck import short
from dsclip.scaling.report import columns
from dsclip.scaling.runs import gmacs_per_sample
from dsclip.scaling.sweep import State, Sweep, slurm_script, sweep_all
from dsclip.scaling.transfer import transferred

EXAMPLE = "python tools/sweep.py demo_study && python tools/scaling_laws.py runs/demo_study/points.csv"


def main(argv: list[str] | None = None) -> None:
    """tools/sweep.py."""
    p = parser(
        "Trains the runs of a grid, goes on where it was stopped, and writes the points that scaling laws are fitted to.",
        EXAMPLE,
    )
    p.add_argument("grid", help=f"a grid's file, or a packaged one: {', '.join(packaged_grids())}")
    p.add_argument(
        "--launch",
        default="deepspeed --num_gpus 2",
        help="what starts launchers/train.py (default: deepspeed --num_gpus 2)",
    )
    p.add_argument(
        "--ds_config", "--ds-config", default="zero3_bf16", help="as of launchers/train.py (default: zero3_bf16)"
    )
    p.add_argument("--list", action="store_true", help="print the runs with their state and train nothing")
    p.add_argument("--only", type=int, metavar="N", help="train the N-th run alone, from 1")
    p.add_argument("--max-runs", type=int, metavar="N", help="stop after N runs")
    p.add_argument("--slurm", type=Path, metavar="FILE", help="write a SLURM job array for the runs and train nothing")
    p.add_argument("--at-a-time", type=int, default=8, help="tasks of the job array at a time (default: 8)")
    sys.exit(run_tool(sweep, p.parse_args(argv)))


def sweep(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """{"grid", "folder", "runs": [{"run", "status", "reason", "steps", "samples_seen", "gmacs_total", "lr"}], "table"}."""
    a = arguments
    work = Sweep(transferred(load_grid(a.grid)))
    count = len(work.grid.runs)
    for name in ("only", "max_runs", "at_a_time"):
        value = getattr(a, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if a.only is not None and a.only > count:
        raise UserError(f"--only is {a.only}, but {work.grid.name} has {count} runs")
    if a.list:
        rows = [described(run, work.state(run)) for run in work.grid.runs]
        return {"grid": work.grid.name, "folder": str(work.folder), "runs": rows, "table": None}, listing(rows)
    work.prepare()
    if a.slurm is not None:
        options = ["--launch", a.launch, "--ds_config", a.ds_config]
        write_whole(a.slurm, slurm_script(work, ["python", "tools/sweep.py", a.grid, *options], a.at_a_time))
        return {"grid": work.grid.name, "folder": str(work.folder), "slurm": str(a.slurm)}, f"sbatch {a.slurm}"

    def train(run: GridRun) -> State:
        return work.train(run, shlex.split(a.launch), a.ds_config)

    states = sweep_all(work, train, say, only=a.only, at_most=a.max_runs)
    rows = [described(run, states[run.name]) for run in work.grid.runs]
    table = str(work.folder / "points.csv")
    counts = Counter(state.status for state in states.values())
    words = ", ".join(f"{n} {status}" for status, n in counts.items())
    trouble = [f"  {r['run']}: {r['status']}: {r['reason']}" for r in rows if r["reason"]]
    text = "\n".join([f"{work.grid.name}: {words}", *trouble, f"next: python tools/scaling_laws.py {table}"])
    return {"grid": work.grid.name, "folder": str(work.folder), "runs": rows, "table": table}, text


def described(run: GridRun, state: State) -> dict[str, Any]:
    """A run as JSON."""
    recipe = run.recipe
    seen = recipe.train.steps * recipe.batch.global_batch_size
    return {
        "run": run.name, **asdict(state), "steps": recipe.train.steps, "samples_seen": seen,
        "global_batch_size": recipe.batch.global_batch_size, "gmacs_total": gmacs_per_sample(recipe) * seen, "lr": recipe.optim.lr,
    }  # fmt: skip


def listing(rows: list[dict[str, Any]]) -> str:
    """The runs for people, with what all of them compute."""
    lines = [["", "run", "steps", "batch", "samples seen", "GMACs", "lr", "state"]]
    for number, r in enumerate(rows, 1):
        lines.append([
            str(number), r["run"], f"{r['steps']:,}", f"{r['global_batch_size']:,}", short(r["samples_seen"]), f"{r['gmacs_total']:.2e}",
            f"{r['lr']:g}", f"{r['status']} {r['reason']}".strip(),
        ])  # fmt: skip
    total = sum(r["gmacs_total"] for r in rows)
    return "\n".join(
        [*columns(lines), f"{len(rows)} runs, {total:.2e} GMACs of forward passes, three times that to train"]
    )
