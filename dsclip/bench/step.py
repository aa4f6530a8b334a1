"""Optimizer steps of one trainer on random images and captions of real length. `python -m dsclip.bench.step JSON`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the launcher does; before torch allocates

import torch

from dsclip.bench.measure import peak_mb, settle
from dsclip.bench.peers import PEERS
from dsclip.config.schema import BatchSection, Checkpointing, OptimSection, Recipe, TrainSection
from dsclip.data import Batch
from dsclip.distributed import Collectives
from dsclip.engine.cpu_bf16 import speed_up_bf16
from dsclip.model import ClipConfig, resolve_preset
from dsclip.model.clip import TEXT_LENGTH_MULTIPLE
from dsclip.plan import Machine, estimate, plan_recipe
from dsclip.plan.advice import describe_choice
from dsclip.plan.machine import this_machine

if TYPE_CHECKING:  # importing it takes DeepSpeed's seconds, which peers are spared
    from dsclip.engine.contrastive import ContrastiveEngine

CAPTION_TOKENS = (8, 22)  # COCO's and web captions, begin and end token included


def make_batch(config: ClipConfig, n: int, seed: int) -> Batch:
    """n samples that the seed draws: images uint8, captions of real length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(*CAPTION_TOKENS, (n,), generator=generator)
    tokens = torch.randint(1, config.eot_token_id - 1, (n, config.context_length), generator=generator)
    positions = torch.arange(config.context_length)[None]
    tokens.masked_fill_(positions > lengths[:, None], 0).masked_fill_(
        positions == lengths[:, None], config.eot_token_id
    )
    shape = (n, 3, config.image_size, config.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Batch(images, tokens, torch.arange(n))


def ours(config: ClipConfig, batch: BatchSection, ds_config: str) -> ContrastiveEngine:
    """dsclip's engine."""
    from dsclip.config import load_ds_config
    from dsclip.engine.contrastive import ContrastiveEngine

    recipe = Recipe(batch=batch, optim=OptimSection(warmup_steps=0), train=TrainSection(steps=1000))
    settings = load_ds_config(ds_config, recipe, 1)
    recipe, _ = plan_recipe(recipe, settings, config, Collectives.single())
    return ContrastiveEngine(recipe, settings, config)


def planned(engine: ContrastiveEngine, machine: Machine) -> dict[str, Any]:
    """What a plan made before the engine was there says of its step, for captions as long as these."""
    tokens = -(-(CAPTION_TOKENS[1] + 1) // TEXT_LENGTH_MULTIPLE) * TEXT_LENGTH_MULTIPLE
    plan = estimate(engine.config, engine.recipe.batch, engine.ds_config, 1, machine, text_tokens=tokens)
    return {"planned_peak_mb": plan.peak_mb, "schedule": describe_choice(plan)}


def measure(
    trainer: str, preset: str, batch: int, steps: int, kind: str, micro_batch: int | None = None,
    chunk_size: int | None = None, checkpointing: Checkpointing = "auto",
    ds_config: str = "zero1_bf16",
) -> dict[str, Any]:  # fmt: skip
    """{"samples_per_second": of the fastest step after two to warm up, "peak_mb"}, and of dsclip what was planned.

    kind: plain | accumulated | auto, the last of dsclip only. accumulated: a peer's step in micro-batches of `micro_batch`
    samples, dsclip's in chunks of `chunk_size`.
    """
    speed_up_bf16()  # for peers too
    config = resolve_preset(preset)
    extra: dict[str, Any] = {}
    step: Callable[[Batch], object]
    if trainer == "dsclip":
        sizes = BatchSection(batch)
        if kind != "auto":
            checkpointing = checkpointing if chunk_size else "none"
            sizes = BatchSection(batch, None, chunk_size, checkpointing, accumulation="manual")
        machine = this_machine()
        engine = ours(config, sizes, ds_config)
        step, extra = engine.train_step, planned(engine, machine)
    else:
        step = PEERS[trainer](config, micro_batch).step
    seconds = []
    for number in range(steps + 2):
        data = make_batch(config, batch, number)
        settle()
        start = time.perf_counter()
        step(data)
        settle()
        seconds.append(time.perf_counter() - start)
    return {"samples_per_second": batch / min(seconds[2:]), "peak_mb": peak_mb(), **extra}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
