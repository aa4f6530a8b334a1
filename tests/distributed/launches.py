"""Starts a short run on two ranks again and again: each launch must exit with 0, and all must have the same losses.

    python -m tests.distributed.launches OUT --launches 100
    python -m tests.distributed.launches OUT --launches 100 --by torchrun

`deepspeed` and `torchrun` start launchers/train.py, by default in turn. `warm` forks ranks that train the tests' model, save and end
as a run does. What a failed launch printed stays in OUT.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from tests.distributed import killed_saves
from tests.distributed.launch import WORKERS, deepspeed, losses, torchrun, warm

STEPS = 2
SHORT = [
    "--config", "demo", "model.vision_layers=1", "model.text_layers=1", "batch.global_batch_size=8", f"train.steps={STEPS}",
    "train.log_every=1", "optim.warmup_steps=1", f"train.save_every={STEPS}", "train.export_hf=false", "eval.every_steps=null",
    "eval.max_samples=4", "eval.batch_size=4",
]  # fmt: skip


def trained(start: Callable[..., CompletedProcess], run: Path) -> tuple[int, str, list]:
    """(exit code, what was printed, losses) of launchers/train.py."""
    done = start(*SHORT, f"train.output={run.parent}", f"train.name={run.name}")
    return done.returncode, done.stdout, [] if done.returncode else sorted(losses(run).items())


def forked(run: Path) -> tuple[int, str, list]:
    """The same of a worker on warm ranks."""
    run.mkdir()
    done = warm(WORKERS / "killed_saves_worker.py", run, 3, "at once", STEPS, -1, 0, 0)
    return done.returncode, done.stdout, [] if done.returncode else killed_saves.losses(run)


STARTED_BY: dict[str, Callable[[Path], tuple[int, str, list]]] = {
    "deepspeed": lambda run: trained(deepspeed, run), "torchrun": lambda run: trained(torchrun, run), "warm": forked,
}  # fmt: skip


def launch_again(out: Path, launches: int, by: list[str]) -> dict:
    """{"launches", "exit_0": that exited with 0, "failed": [[number, started by, what went wrong]], "seconds"}."""
    failed, exits, expected, begun = [], 0, {}, time.monotonic()
    for number in range(1, launches + 1):
        how, run, started = by[(number - 1) % len(by)], out / f"launch_{number:03d}", time.monotonic()
        try:
            code, printed, found = STARTED_BY[how](run)
            exits += code == 0
            same = found == expected.setdefault(how, found) and len(found) == STEPS
            wrong = f"exit code {code}" if code else "" if same else f"losses {found} instead of {expected[how]}"
        except AssertionError as error:  # it took too long
            printed, wrong = str(error), "took too long"
        if wrong:
            failed.append([number, how, wrong])
            run.with_suffix(".txt").write_text(printed)
        else:
            shutil.rmtree(run)
        took = f"{time.monotonic() - started:.1f} s"
        print(
            f"launch {number} of {launches}, {how}: {wrong or 'exit code 0'}, {took}; {exits} exited with 0", flush=True
        )
    return {"launches": launches, "exit_0": exits, "failed": failed, "seconds": round(time.monotonic() - begun, 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the runs; must be empty or absent")
    parser.add_argument("--launches", type=int, default=100)
    parser.add_argument("--by", choices=STARTED_BY, action="append", help="may be given again: they take turns")
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        sys.exit(f"{arguments.out} holds something already")
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = launch_again(arguments.out.resolve(), arguments.launches, arguments.by or ["deepspeed", "torchrun"])
    print(json.dumps(found))
    sys.exit(1 if found["failed"] else 0)
