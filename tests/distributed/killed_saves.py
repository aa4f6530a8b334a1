"""Kills a random rank with SIGKILL at random moments of saving, and shows that the newest complete checkpoint always continues the run.

    python -m tests.distributed.killed_saves OUT --kills 50

Two ranks, ZeRO-3 with a persistence threshold of 0 and ZeRO-2, checkpoints written at once and in the background, in turn. After
each kill the newest complete checkpoint is verified, and the next launch continues it. In the end each run has the losses of one that nobody
disturbed, to the last digit, and nothing but complete checkpoints.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from dsclip.checkpoint.lineage import complete_checkpoints
from dsclip.checkpoint.manifest import verify
from tests.distributed.killed_saves_worker import KEPT
from tests.distributed.launch import WORKERS, warm

SIGKILL = 9
RUNS = [(3, "background"), (3, "at once"), (2, "background"), (2, "at once")]
ENDLESS = 10**6


def kill_saves(out: Path, kills: int, seed: int, runs: list[tuple[int, str]] = RUNS) -> dict[str, int]:
    """{"kills", "within_a_save": after which a part of a checkpoint lay there, "steps", "steps_again"}. Raises AssertionError."""
    rng = random.Random(seed)
    found = {"kills": 0, "within_a_save": 0, "steps": 0, "steps_again": 0}
    for number in range(kills):
        stage, how = runs[number % len(runs)]
        run = out / f"{stage} {how}"
        run.mkdir(parents=True, exist_ok=True)
        victim, after = rng.randrange(2), rng.randint(1, 3)
        launch(run, stage, how, ENDLESS, victim, after, rng.randrange(2**32), code=SIGKILL)
        complete = complete_checkpoints(run / "checkpoints")
        if complete:
            verify(complete[-1])
        assert len(complete) <= KEPT + 1, f"kill {number}: {complete}"
        found["kills"] += 1
        found["within_a_save"] += any(p.suffix == ".tmp" for p in (run / "checkpoints").iterdir())
        print(
            f"kill {number + 1} of {kills}: rank {victim}, ZeRO-{stage}, {how}: {len(complete)} checkpoints are whole",
            flush=True,
        )
    for stage, how in runs:
        run, whole = out / f"{stage} {how}", out / f"{stage} undisturbed"
        steps = 2 + max(step for step, _ in losses(run))
        launch(run, stage, how, steps)
        whole.mkdir(exist_ok=True)
        launch(whole, stage, "end", steps)  # continues that of the other run of this stage
        left = sorted(p.name for p in (run / "checkpoints").iterdir())
        assert left == [p.name for p in complete_checkpoints(run / "checkpoints")] and len(left) <= KEPT, left
        expected = dict(losses(whole))
        assert all(expected[step] == loss for step, loss in losses(run)), f"{run} has other losses than {whole}"
        found["steps"] += steps
        found["steps_again"] += len(losses(run)) - steps
    return found


def launch(
    run: Path, stage: int, how: str, steps: int, victim: int = -1, after: int = 0, seed: int = 0, code: int = 0
) -> None:
    """One launch of two ranks, which must end with a code."""
    done = warm(WORKERS / "killed_saves_worker.py", run, stage, how, steps, victim, after, seed, timeout_s=300)
    assert done.returncode == code, f"exit code {done.returncode} instead of {code}\n{done.stdout[-6000:]}"


def losses(run: Path) -> list[tuple[int, str]]:
    """(step, its loss in hex) as rank 0 computed them, some of them again."""
    lines = (run / "log_0.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the runs; must be empty or absent")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        sys.exit(f"{arguments.out} holds something already")
    print(f"seed {arguments.seed}", flush=True)
    print(json.dumps(kill_saves(arguments.out, arguments.kills, arguments.seed)))
