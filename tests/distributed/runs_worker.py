"""Run on every rank: whole runs one after the other in the same ranks, as a user would start them; writes one JSON file."""

import contextlib
import io
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import dsclip.train.inputs as inputs_module
from dsclip import distributed
from dsclip.distributed import Collectives, shutdown_distributed
from dsclip.engine.build import init_distributed
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.errors import UserError
from dsclip.train import run as train_run
from dsclip.train.cli import parse_arguments

SMALL = [
    "batch.global_batch_size=16", "model.vision_layers=1", "model.text_layers=1", "train.log_every=1", "optim.warmup_steps=1",
    "optim.schedule=constant", "eval.zeroshot_shards=null", "eval.retrieval_shards=null", "eval.hard_negatives_shards=null",
    "train.export_hf=false", "train.save_every=1", "train.keep_checkpoints=9", "data.workers=0", "data.max_bad_fraction=0.9",
]  # fmt: skip


class Runs:
    """Starts runs below one folder and notes what each left behind."""

    def __init__(self, folder: Path, group: Collectives):
        self._folder, self._group, self.results = folder, group, {}
        self._common = [*SMALL, f"data.train_shards={folder}/shards", f"train.output={folder}/runs"]

    def checkpoint(self, name: str, step: int) -> str:
        return str(self._folder / "runs" / name / "checkpoints" / f"step_{step:08d}")

    def start(self, case: str, name: str, *options: str) -> None:
        """One run; `results[case]` says how it ended, what it printed and what is in its folder then."""
        arguments = [
            "--ds_config",
            "ds_configs/zero3_bf16.json",
            "--config",
            "demo",
            *self._common,
            f"train.name={name}",
            *options,
        ]
        shown, error = io.StringIO(), None
        try:
            with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
                train_run.run(parse_arguments(arguments))
        except UserError as found:
            error = f"{type(found).__name__}: {found}"
        except Exception:
            error = traceback.format_exc()
        run = self._folder / "runs" / name
        self.results[case] = {
            "error": error,
            "ranks": self._group.all_gather_object(error),
            "shown": shown.getvalue(),
            "checkpoints": sorted(p.name for p in (run / "checkpoints").glob("*")),
            "metrics": read_lines(run / "metrics.jsonl"),
            "summary": json.loads((run / "summary.json").read_text()) if (run / "summary.json").is_file() else None,
        }
        self._group.barrier()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def failing_evaluation(group: Collectives, kind: str):
    """An evaluation that is due at every second step, and fails at the second."""

    class Failing(inputs_module.Evaluation):
        def due(self, step, last):
            return step % 2 == 0

        def run(self, engine, watch):
            if engine.step == 2 or kind == "last":
                if kind == "on one rank" and group.rank == 1:
                    raise ValueError("a picture that can't be drawn")
                if kind != "on one rank":
                    raise UserError("the shard val/0.tar is gone")
            return {"zeroshot": {"top1": 0.5, "top5": 1.0, "samples": 4, "classes": 2}}

    return Failing


@contextlib.contextmanager
def signalled(rank: int, group: Collectives, number: signal.Signals, step: int):
    """One rank gets a signal while it makes a step."""
    original = ContrastiveEngine.train_step

    def train_step(self, batch, **options):
        if group.rank == rank and self.step + 1 == step:
            os.kill(os.getpid(), number)
        return original(self, batch, **options)

    with patch.object(ContrastiveEngine, "train_step", train_step):
        yield


def main(out: str, folder: str) -> None:
    init_distributed()
    group = Collectives.current()
    runs = Runs(Path(folder), group)
    # Stopped at its end, looked at again, and extended; the same from a copy of it.
    runs.start("whole", "whole", "train.steps=6")
    runs.start("part", "part", "train.steps=3")
    runs.start("part again", "part", "train.steps=3", "--resume", "auto")
    runs.start("fork", "fork", "train.steps=3", "--resume", runs.checkpoint("part", 3))
    runs.start("fork extended", "fork", "train.steps=6", "--resume", "auto")
    for number, rank in ((signal.SIGTERM, 0), (signal.SIGUSR1, 1)):
        name = f"stopped_by_{number.name}"
        with signalled(rank, group, number, step=3):
            runs.start(name, name, "train.steps=6", "train.save_every=null")
        runs.start(f"{name} again", name, "train.steps=6", "train.save_every=null", "--resume", "auto")
    if group.rank == 0:
        (Path(runs.checkpoint("part", 9) + ".tmp") / "deepspeed").mkdir(parents=True)
    group.barrier()
    runs.start("part extended", "part", "train.steps=6", "optim.lr=1e-3", "data.flip=true", "--resume", "auto")
    # Back to an earlier checkpoint, and on from there.
    runs.start("rewound", "whole", "train.steps=4", "train.keep_checkpoints=2", "--resume", runs.checkpoint("whole", 2))
    runs.start("rewound on", "whole", "train.steps=5", "--resume", "auto")
    # Refused.
    runs.start("another run's", "whole", "train.steps=6", "--resume", runs.checkpoint("part", 3))
    runs.start("too short", "part", "train.steps=2", "--resume", "auto")
    runs.start("another loss", "part", "train.steps=9", "loss.name=sigmoid", "--resume", "auto")
    # A temperature that is scheduled from that of other weights.
    schedule = [f"model.init={runs.checkpoint('part', 6)}", "loss.temperature=scheduled", "loss.final_temperature=0.02"]
    runs.start("scheduled", "scheduled", "train.steps=4", *schedule)
    runs.start("scheduled again", "scheduled", "train.steps=4", *schedule, "--resume", runs.checkpoint("scheduled", 2))
    # Students of that run's model: one that begins as it, and one that doesn't.
    taught = [
        f"objective.teacher={runs.checkpoint('part', 6)}",
        "objective.terms=[{name: distill, between: [image, text]}]",
    ]
    runs.start("its teacher", "its_teacher", "train.steps=1", f"model.init={runs.checkpoint('part', 6)}", *taught)
    runs.start("taught", "taught", "train.steps=2", *taught)
    runs.start("taught on", "taught", "train.steps=3", *taught, "--resume", "auto")
    # Evaluations that fail.
    original = inputs_module.Evaluation
    for kind in ("on all ranks", "on one rank", "last"):
        inputs_module.Evaluation = failing_evaluation(group, kind)
        runs.start(
            f"evaluation {kind}",
            kind.replace(" ", "_"),
            "train.steps=4",
            "train.save_every=null",
            "eval.zeroshot_shards=demo:val",
        )
    inputs_module.Evaluation = original
    runs.start("by the clock", "clock", "train.steps=3", "train.save_every=null", "train.save_minutes=1e-9")
    runs.results["full"] = None
    if os.path.ismount(Path(folder) / "runs" / "full"):
        runs.start("full", "full", "train.steps=3")
    if hasattr(group, "meet"):
        alone = None if group.rank else group.meet("here", timeout_s=0.5)
        group.barrier()
        if group.rank:
            next(distributed._meetings)  # rank 0 was at the first one without this rank
        together = group.meet(f"rank {group.rank}", timeout_s=60)
        runs.results["meetings"] = [alone, together]
    if group.rank == 0:
        Path(out).write_text(json.dumps(runs.results))
    shutdown_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
