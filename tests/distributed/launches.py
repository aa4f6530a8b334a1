"""Starts a short run on two ranks again and again: each launch must exit with 0, and all must have the same losses.

    python -m tests.distributed.launches OUT --launches 100
    python -m tests.distributed.launches OUT --launches 100 --by torchrun

By default `deepspeed` and `torchrun` take turns; `warm` forks the ranks instead, as most tests do. What a failed launch printed stays in OUT.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from tests.distributed.launch import deepspeed, losses, torchrun, train

STARTED_BY: dict[str, Callable[..., CompletedProcess]] = {"deepspeed": deepspeed, "torchrun": torchrun, "warm": train}
SHORT = [
    "--config", "demo", "model.vision_layers=1", "model.text_layers=1", "batch.global_batch_size=8", "train.steps=2", "train.log_every=1",
    "optim.warmup_steps=1", "train.save_every=2", "train.export_hf=false", "eval.every_steps=null", "eval.max_samples=4", "eval.batch_size=4",
]  # fmt: skip


def launch_again(out: Path, launches: int, by: list[str]) -> dict:
    """{"launches", "exit_0", "failed": [[number, how it was started, exit code or what went wrong]], "seconds", "losses"}."""
    failed, expected, started = [], None, time.monotonic()
    for number in range(1, launches + 1):
        how, run = by[(number - 1) % len(by)], out / f"launch_{number:03d}"
        begun = time.monotonic()
        try:
            done = STARTED_BY[how](*SHORT, f"train.output={out}", f"train.name={run.name}")
            wrong, printed = done.returncode, done.stdout
        except AssertionError as error:  # it took too long
            wrong, printed = "too long", str(error)
        if wrong == 0:
            found = losses(run)
            expected = expected or found
            wrong = 0 if found == expected and len(found) == 2 else f"its losses are {found} instead of {expected}"
        if wrong:
            failed.append([number, how, wrong])
            run.with_suffix(".txt").write_text(printed)
        else:
            shutil.rmtree(run)
        seconds = time.monotonic() - begun
        said = f"exit code {wrong}" if isinstance(wrong, int) else wrong
        print(
            f"launch {number} of {launches}, {how}: {said}, {seconds:.1f} s; {number - len(failed)} of {number} went well",
            flush=True,
        )
    return {
        "launches": launches, "exit_0": launches - len(failed), "failed": failed, "seconds": round(time.monotonic() - started, 1),
        "losses": expected,
    }  # fmt: skip


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
