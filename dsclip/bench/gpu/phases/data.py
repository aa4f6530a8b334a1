"""The input path: samples a second and core by number of workers, and how long steps wait for it."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dsclip.bench.data_cli import write_resized
from dsclip.bench.gpu.phases.train import NO_EVALUATION, launch, logged
from dsclip.bench.gpu.row import Facts, Row, Settings
from dsclip.bench.measure import in_process
from dsclip.data import resolve_shards


def measure(settings: Settings) -> Iterator[Row | Facts]:
    """The demo's pictures written anew at 512×384; then a ViT-L/14 that trains on them."""
    counts, samples, size = ((1,), 128, "96x64") if settings.tiny else ((4, 8, 14), 6000, "512x384")
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        shards.mkdir()
        write_resized(str(resolve_shards("demo")[0]), shards, size)
        for workers in counts:
            options = dict(
                variant="dsclip", shards=str(shards), image_size=224, tokenizer="demo", workers=workers, samples=samples
            )
            rate = in_process("dsclip.bench.data", options)["samples_per_second_per_core"]
            yield Row(f"{size}, {workers} workers, a core", rate, "samples/s", accept=700)
        if settings.tiny:
            yield Row("share of a step that waits for data", None, note="with a ViT-L/14 on a GPU only")
            return
        launch(
            "model.preset=ViT-L-14", "batch.global_batch_size=256", f"data.train_shards={shards}", f"data.workers={counts[-1]}",
            "train.name=bench", f"train.output={folder}", "train.steps=20", "train.log_every=2", "optim.warmup_steps=2",
            "train.save_every=1000", "eval.every_steps=null", *NO_EVALUATION,
        )  # fmt: skip
        waits = list(logged(Path(folder) / "bench", "data_wait").values())
        yield Row(
            "share of a step that waits for data",
            statistics.median(waits[len(waits) // 2 :]),
            accept=0.02,
            at_most=True,
        )
