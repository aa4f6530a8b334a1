"""The command line of `launchers/submit.py`: a recipe or a grid as a job of SLURM's, checked before it waits in a queue."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from dsclip.child import ROOT
from dsclip.command_line import parser, run_tool
from dsclip.config import load_grid
from dsclip.errors import RunFailed, UserError
from dsclip.files import write_whole
from dsclip.scaling.sweep import Sweep, slurm_script
from dsclip.scaling.transfer import transferred

EXAMPLE = (
    "python launchers/submit.py --nodes 4 --time 12:00:00 --sbatch=--partition=gpu --config my.yaml train.name=b32"
)
BATCH_SCRIPT = "launchers/slurm.sbatch"
LEAST_TIMES = 2  # times --save-seconds: a job gets at least as long for its work


def main(argv: list[str] | None = None) -> None:
    """launchers/submit.py."""
    p = parser("Sends a training, or all runs of a grid, to a SLURM cluster.", EXAMPLE)
    p.add_argument("--config", help="as of launchers/train.py")
    p.add_argument("--grid", help="instead of a recipe: a job array with a task for each run, as of tools/sweep.py")
    p.add_argument("--at-a-time", type=int, default=8, help="of a grid: tasks at a time (default: 8)")
    p.add_argument("--ds_config", "--ds-config", default="zero3_bf16", help="as of launchers/train.py (default: zero3_bf16)")  # fmt: skip
    p.add_argument("--nodes", type=int, default=1, help="of a run (default: 1)")
    p.add_argument("--ranks-per-node", type=int, default=8, help="one for each GPU (default: 8)")
    p.add_argument("--gpus-per-node", type=int, help="default: as many as ranks; 0 on nodes without")
    p.add_argument("--cpus-per-rank", type=int, help="for the rank and its data workers (default: the cluster's)")
    p.add_argument("--time", help="after which the job is stopped, saved and requeued, such as 12:00:00")
    p.add_argument(
        "--save-seconds", type=int, default=120, help="before that time, in which a step and its checkpoint must end (default: 120)"
    )  # fmt: skip
    p.add_argument(
        "--sbatch", action="append", default=[], metavar="=OPTION", help="a further option of sbatch: --sbatch=--partition=gpu"
    )  # fmt: skip
    p.add_argument(
        "--print",
        action="store_true",
        help="show the command, submit nothing (of a grid, its recipes and script are written all the same)",
    )
    p.add_argument("--no-check", action="store_true", help="don't check the recipe here, where its data can't be read")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the recipe")
    sys.exit(run_tool(submit, p.parse_intermixed_args(argv)))


def submit(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """({"command", "job"}, text). job: SLURM's number; None with --print. Raises UserError for what no job could run."""
    a = arguments
    for name in ("nodes", "ranks_per_node", "cpus_per_rank", "at_a_time", "save_seconds"):
        if (value := getattr(a, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if (a.gpus_per_node or 0) < 0:
        raise UserError(f"--gpus-per-node is {a.gpus_per_node}; it must be at least 0")
    if a.time is not None and (seconds := seconds_of(a.time)) < LEAST_TIMES * a.save_seconds:
        raise UserError(
            f"--time is {a.time}, {seconds} s, and the run is told to save {a.save_seconds} s before that: it would be requeued again and again "
            f"without much done. Give {LEAST_TIMES} times as long at least, or less --save-seconds"
        )
    if a.grid is not None and (a.config is not None or a.overrides):
        raise UserError("--grid: the grid says what its runs are; leave out --config and overrides")
    if a.grid is None and not a.no_check:
        check(a)
    command = ["sbatch", "--parsable", *options(a), *(batch_of_grid(a) if a.grid else [BATCH_SCRIPT, *training(a)])]
    if a.print:
        return {"command": command, "job": None}, shlex.join(command)
    if shutil.which("sbatch") is None:
        raise UserError("there is no `sbatch` here; start this on a node that jobs are sent from, or add --print")
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    if done.returncode:
        raise RunFailed(f"sbatch refused the job: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]  # followed by the cluster's name where there are several
    return {"command": command, "job": job}, f"job {job}: squeue --job {job}; scancel {job} ends it for good"


def seconds_of(limit: str) -> int:
    """A time limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises UserError."""
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", limit):
        raise UserError(f"--time is {limit}; give minutes, M:S, H:M:S, or days before that as in 2-12:00:00")
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days or len(parts) == 3:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def options(a: argparse.Namespace) -> list[str]:
    """Those of sbatch, which win over the script's."""
    gpus = a.ranks_per_node if a.gpus_per_node is None else a.gpus_per_node
    found = [f"--nodes={a.nodes}", f"--ntasks-per-node={a.ranks_per_node}", f"--gpus-per-node={gpus}"]
    found += [] if a.cpus_per_rank is None else [f"--cpus-per-task={a.cpus_per_rank}"]
    found += [] if a.time is None else [f"--time={a.time}"]
    return [*found, f"--signal=USR1@{a.save_seconds}", *a.sbatch]


def training(a: argparse.Namespace) -> list[str]:
    """The arguments of launchers/train.py, which runs in the checkout."""
    config = [] if a.config is None else ["--config", in_checkout(a.config)]
    return ["--ds_config", in_checkout(a.ds_config), *config, *a.overrides]


def in_checkout(name: str) -> str:
    """A file that is there by its whole path; other names as they are."""
    return str(Path(name).resolve()) if Path(name).is_file() else name


def batch_of_grid(a: argparse.Namespace) -> list[str]:
    """Writes the grid's recipes and its script, as tools/sweep.py does; the script's path."""
    sweep = Sweep(transferred(load_grid(a.grid)))
    sweep.prepare()
    command = ["python", "tools/sweep.py", in_checkout(a.grid), "--launch", "srun python"]
    path = sweep.folder.resolve() / "array.sbatch"
    write_whole(path, slurm_script(sweep, [*command, "--ds_config", in_checkout(a.ds_config)], a.at_a_time))
    return [str(path)]


def check(a: argparse.Namespace) -> None:
    """As `--dry-run` on the job's ranks: what is wrong is said now and not after hours in a queue. Raises UserError."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(a.nodes * a.ranks_per_node)}
    command = [sys.executable, "launchers/train.py", "--dry-run", "--resume", "auto", *training(a)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ranks, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["the dry run said nothing"]
        raise UserError(f"{said[-1].removeprefix('dsclip: ')} (--no-check submits all the same)")
