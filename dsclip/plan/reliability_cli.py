"""`tools/plan.py --reliability`: what failures cost a job of this size, and how often to save."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from dsclip.errors import UserError
from dsclip.plan.reliability import GPU_HOURS_A_FAILURE, Failures, band

INTERVALS_S = (60, 300, 900, 1800, 3600)  # shown beside the best; 30 minutes are `train.save_minutes` by default
OPTIONS = ("mtbf_hours", "save_seconds", "write_seconds", "restart_seconds", "run", "run_days")
LEAST = 0.05  # of the time; jobs below it need another machine, not another interval


def add_reliability(p: argparse.ArgumentParser) -> None:
    """The options of --reliability."""
    group = p.add_argument_group(
        "failures: the effective training time ratio of a job of --gpus, and how often to save"
    )
    group.add_argument("--reliability", action="store_true", help="answer this and nothing else")
    group.add_argument(
        "--mtbf-hours", type=float,
        help=f"mean time between failures of the job (default: Llama 3's rate, {GPU_HOURS_A_FAILURE:,.0f} GPU hours, by --gpus)",
    )  # fmt: skip
    group.add_argument("--run", type=Path, help="a run of this job, whose metrics.jsonl has the two times that follow")
    group.add_argument("--save-seconds", type=float, help="that training stands still for a save")
    group.add_argument("--restart-seconds", type=float, help="from a failure to the next step")
    group.add_argument(
        "--write-seconds", type=float, help="until a save is complete, if it goes on in the background (default: --save-seconds)"
    )  # fmt: skip
    group.add_argument("--run-days", type=float, help="of steps, for the range of single runs (default: 14)")


def refuse_without(a: argparse.Namespace) -> None:
    """Raises UserError for an option of failures where nobody asks about them."""
    for name in OPTIONS:
        if getattr(a, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} belongs to --reliability; add that, or leave it out")


def reliability(a: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """{"ettr", "ettr_90", "save_interval_seconds", …} at the best interval, and the table for people."""
    seconds = {"save_seconds": a.save_seconds, "restart_seconds": a.restart_seconds}
    if a.run is not None:
        measured = _of_run(a.run)
        seconds = {name: measured[name] if given is None else given for name, given in seconds.items()}
    missing = [f"--{name.replace('_', '-')}" for name, value in seconds.items() if value is None]
    if missing:
        raise UserError(f"--reliability needs {' and '.join(missing)}, or --run with a run that has saved and started")
    hours = GPU_HOURS_A_FAILURE / a.gpus if a.mtbf_hours is None else a.mtbf_hours
    write = seconds["save_seconds"] if a.write_seconds is None else a.write_seconds
    days = 14.0 if a.run_days is None else a.run_days
    checked = {**seconds, "mtbf_hours": hours, "write_seconds": write, "run_days": days}
    for name, value in checked.items():
        if not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be greater than 0")
    if write < seconds["save_seconds"]:
        raise UserError(
            f"--write-seconds is {write}, less than the {seconds['save_seconds']} for which training stands still"
        )
    job = Failures(3600 * hours, seconds["save_seconds"], write, seconds["restart_seconds"])
    best, steps_s = job.best_interval_s(), 86_400 * days
    if job.ettr(best) < LEAST:
        raise UserError(
            f"such a job makes no progress: with a failure in {hours:,.3g} hours, saves that count after {write:,.3g} s and restarts of "
            f"{job.restart_s:,.3g} s, at most {job.ettr(best):.2%} of its time would go into steps that count"
        )
    rows = [
        (interval, job.ettr(interval)) for interval in sorted({*INTERVALS_S, best}) if interval >= write - job.stall_s
    ]
    low, high = band(job, best, steps_s)
    result = {
        "gpus": a.gpus, **checked, "save_interval_seconds": best, "ettr": job.ettr(best), "ettr_90": [low, high],
        "intervals": [{"seconds": interval, "ettr": ettr} for interval, ettr in rows],
    }  # fmt: skip
    lines = [
        f"{a.gpus} GPUs, a failure in {hours:,.1f} hours on average; a save stops training for {job.stall_s:.3g} s and counts after "
        f"{job.durable_s:.3g} s; a restart takes {job.restart_s:.3g} s", "",
        "  saved every   effective training time",
        *(f"  {_time(interval):>11}   {ettr:.2%}{'  best' if interval == best else ''}" for interval, ettr in rows), "",
        f"90 of 100 runs of {days:g} days of steps end between {low:.2%} and {high:.2%} at the best (simulated)",
        f"In the recipe: train.save_minutes={best / 60:.2g}",
    ]  # fmt: skip
    return result, "\n".join(lines)


def _of_run(run: Path) -> dict[str, float]:
    """Medians of what a run measured. Raises UserError when it has no such numbers."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"--run {run}: there is no metrics.jsonl in it")
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = {}
    for name, logged in (("save_seconds", "save_seconds"), ("restart_seconds", "start_seconds")):
        values = [entry[logged] for entry in entries if entry.get(logged) is not None]
        if not values:
            raise UserError(
                f"--run {run}: its metrics.jsonl has no `{logged}`; it is of an earlier version, or never saved"
            )
        found[name] = statistics.median(values)
    return found


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
