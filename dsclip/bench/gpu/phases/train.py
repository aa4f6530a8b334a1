"""The main job on this device: it trains, saves, and goes on from its checkpoint with the same losses."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dsclip.bench.gpu.row import Facts, Row, Settings

TRAIN = "from dsclip.train.cli import main; main()"
SMALL = ("model.vision_layers=1", "model.text_layers=1", "batch.global_batch_size=32")
NO_EVALUATION = tuple(f"eval.{name}_shards=null" for name in ("zeroshot", "retrieval", "hard_negatives"))


def measure(settings: Settings) -> Iterator[Row | Facts]:
    """The loss's fall, and the largest difference of losses after a checkpoint that the run was resumed from."""
    steps, every = (8, 1) if settings.tiny else (80, 2)
    with tempfile.TemporaryDirectory() as folder:
        common = [
            "train.name=bench", f"train.output={folder}", f"train.steps={steps}", f"train.save_every={steps // 2}",
            f"train.log_every={every}", "train.keep_checkpoints=3", "optim.warmup_steps=2", "eval.max_samples=60",
            "eval.every_steps=null", *((*SMALL, *NO_EVALUATION) if settings.tiny else ()),
        ]  # fmt: skip
        before = launch(*common)
        run = Path(folder) / "bench"
        losses = logged(run, "loss")
        first, last = losses[min(losses)], losses[max(losses)]
        yield Row(
            "loss, last over first",
            last / first,
            accept=0.98,
            at_most=True,
            exactness=True,
            note=f"{first:.4f} → {last:.4f}",
        )
        launch(*common, "--resume", str(run / "checkpoints" / f"step_{steps // 2:08d}"))
        again = logged(run, "loss")
        differences = [abs(again[step] - losses[step]) for step in losses if step > steps // 2]
        note = f"{len(differences)} logged steps, {before:.0f} s the first launch"
        yield Row(
            "loss after resuming, difference", max(differences), accept=1e-3, at_most=True, exactness=True, note=note
        )


def launch(*arguments: str) -> float:
    """`launchers/train.py` with one rank and `zero3_bf16`; returns its seconds. Raises CalledProcessError."""
    started = time.perf_counter()
    command = [sys.executable, "-c", TRAIN, "--ds_config", "zero3_bf16", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return time.perf_counter() - started


def logged(run: Path, name: str) -> dict[int, float]:
    """{step: value} of a scalar in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}
