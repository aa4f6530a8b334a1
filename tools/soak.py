"""Kills a supervised run at random moments and shows that it ends as if nothing had happened; prints its effective training time.

On a laptop:   python tools/soak.py OUT --kills 20
On a GPU:      the same, with --ranks as many as there are

Trains the demo's recipe twice into OUT: once undisturbed, and once under launchers/supervise.py while this program kills, with
SIGKILL, a rank or a launcher of DeepSpeed's after random times. Both runs must have the same losses, gradient norms and
batches, to the last digit. Keys of the recipe follow: python tools/soak.py OUT train.steps=500
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

from dsclip.command_line import parser, run_tool, say
from dsclip.errors import RunFailed, UserError

ROOT = Path(__file__).parent.parent
SAME = ("step", "loss", "grad_norm", "logit_scale", "batch_hash")
RECIPE = [
    "train.steps=300", "batch.global_batch_size=64", "train.save_every=10", "train.log_every=1", "train.export_hf=false",
    "eval.every_steps=null",
]  # fmt: skip


def command(a: argparse.Namespace, name: str) -> list[str]:
    """The training command of one of the two runs."""
    return [
        "deepspeed", "--master_port", str(a.master_port), "--num_gpus", str(a.ranks), "launchers/train.py", "--ds_config", a.ds_config,
        "--config", "demo", *RECIPE, *a.overrides, f"train.output={a.out}", f"train.name={name}", "--resume", "auto",
    ]  # fmt: skip


def logged(run: Path) -> list[list]:
    """What both runs must have in common, step by step."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [[line.get(key) for key in SAME] for line in lines if "loss" in line]


def victims(supervisor: int) -> list[psutil.Process]:
    """The launchers and ranks of the present launch."""
    found = []
    for process in psutil.Process(supervisor).children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if any(word.endswith(("launchers/train.py", "/deepspeed")) for word in line):
            found.append(process)
    return found


def disturbed(a: argparse.Namespace, rng: random.Random) -> list[str]:
    """The supervised run with its kills, from its start to its end; what was killed. Raises RunFailed."""
    killed: list[str] = []
    supervisor = subprocess.Popen(
        [sys.executable, "launchers/supervise.py", "--crashes-a-day", str(10 * a.kills), "--crashes-a-step", "10", "--grace", "60",
         "--", *command(a, "disturbed")],
        cwd=ROOT, stdout=sys.stderr,
    )  # fmt: skip
    next_kill = time.monotonic() + rng.uniform(*a.every)
    while supervisor.poll() is None:
        time.sleep(0.05)
        if len(killed) == a.kills or time.monotonic() < next_kill:
            continue
        if found := victims(supervisor.pid):
            victim = rng.choice(found)
            try:
                what = "a rank" if "RANK" in victim.environ() else "a launcher"
                victim.kill()
            except psutil.Error:  # it ended by itself
                continue
            killed.append(what)
            say(f"kill {len(killed)} of {a.kills}: {what}, process {victim.pid}")
        next_kill = time.monotonic() + rng.uniform(*a.every)
    if supervisor.returncode:
        raise RunFailed(f"the supervised run ended with exit code {supervisor.returncode}; its lines above say why")
    return killed


def soak(a: argparse.Namespace) -> tuple[dict, str]:
    """Both runs and their comparison. Raises RunFailed when they differ."""
    a.out = a.out.resolve()
    if (a.out / "disturbed").exists():
        raise UserError(f"{a.out} holds a soak already; give another folder")
    seed = random.SystemRandom().randrange(2**32) if a.seed is None else a.seed
    say(f"seed of the kills: {seed}")
    if not (a.out / "whole" / "summary.json").exists():
        done = subprocess.run(command(a, "whole"), cwd=ROOT, stdout=sys.stderr)
        if done.returncode:
            raise RunFailed(f"the undisturbed run ended with exit code {done.returncode}; its lines above say why")
    killed = disturbed(a, random.Random(seed))
    expected, found = logged(a.out / "whole"), logged(a.out / "disturbed")
    if expected != found:
        first = next((e for e, f in zip(expected, found, strict=False) if e != f), "the number of steps")
        raise RunFailed(
            f"the runs differ, first at {first}; compare metrics.jsonl of {a.out}/whole and {a.out}/disturbed"
        )
    record = json.loads((a.out / "disturbed" / "supervisor.json").read_text())
    result = {"seed": seed, "kills": len(killed), "ranks_killed": killed.count("a rank"), "steps": len(found), **record}
    return result, (
        f"{len(killed)} kills ({killed.count('a rank')} of ranks), {record['restarts']} restarts: {len(found)} steps with the losses, "
        f"norms and batches of the undisturbed run, to the last digit. Effective training time ratio {record['ettr']:.1%} of "
        f"{record['wall_seconds']:.0f} s."
    )


def main() -> None:
    """Parses, runs, exits with 0, 1 or 2."""
    p = parser(
        "Kills a supervised run at random and compares it with an undisturbed one.",
        "python tools/soak.py OUT --kills 20",
    )
    p.add_argument("out", metavar="OUT", type=Path, help="folder of both runs")
    p.add_argument("--kills", type=int, default=20, help="fewer when the run ends before (default: 20)")
    p.add_argument(
        "--every",
        type=float,
        nargs=2,
        default=[5, 40],
        metavar="SECONDS",
        help="shortest and longest time between two (default: 5 40)",
    )
    p.add_argument("--seed", type=int, help="of times and victims (default: another each time)")
    p.add_argument("--ranks", type=int, default=2, help="processes of a run (default: 2)")
    p.add_argument("--ds_config", "--ds-config", default="ds_configs/zero3_bf16.json", help="as of launchers/train.py")
    p.add_argument("--master_port", type=int, default=29500, help="as of deepspeed (default: 29500)")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the recipe")
    sys.exit(run_tool(soak, p.parse_intermixed_args()))


if __name__ == "__main__":
    main()
