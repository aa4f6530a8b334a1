"""Optimizer steps of one trainer on random images and captions of real length. `python -m dsclip.bench.step JSON`."""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the launcher does; before torch allocates

import torch

from dsclip.bench.measure import peak_mb, settle
from dsclip.bench.peers import PEERS
from dsclip.config.schema import BatchSection, OptimSection, Recipe, TrainSection
from dsclip.model import ClipConfig, resolve_preset

CAPTION_TOKENS = (8, 22)  # COCO's and web captions, begin and end token included


def make_batch(config: ClipConfig, n: int, seed: int) -> dict:
    """images uint8 [n, 3, S, S], tokens [n, context], sample_ids [n]."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(*CAPTION_TOKENS, (n,), generator=generator)
    tokens = torch.randint(1, config.eot_token_id - 1, (n, config.context_length), generator=generator)
    positions = torch.arange(config.context_length)[None]
    tokens.masked_fill_(positions > lengths[:, None], 0).masked_fill_(
        positions == lengths[:, None], config.eot_token_id
    )
    shape = (n, 3, config.image_size, config.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return {"images": images, "tokens": tokens, "sample_ids": torch.arange(n)}


def ours(config: ClipConfig, batch: int, micro_batch: int | None, ds_config: str, checkpointing: str):
    """A function that takes one step of dsclip's engine."""
    from dsclip.config import load_ds_config
    from dsclip.engine import ContrastiveEngine

    recipe = Recipe(
        batch=BatchSection(batch, chunk_size=micro_batch, checkpointing=checkpointing),
        optim=OptimSection(warmup_steps=0),
        train=TrainSection(steps=1000),
    )
    engine = ContrastiveEngine(recipe, load_ds_config(ds_config, recipe, 1), config)
    return engine.train_step


def measure(trainer: str, preset: str, batch: int, micro_batch: int | None, steps: int, **options) -> dict:
    """{"samples_per_second": of the fastest step after two to warm up, "peak_mb"}."""
    config = resolve_preset(preset)
    step = ours(config, batch, micro_batch, **options) if trainer == "dsclip" else PEERS[trainer](config, micro_batch)
    seconds = []
    for number in range(steps + 2):
        data = make_batch(config, batch, number)
        settle()
        start = time.perf_counter()
        step(data)
        settle()
        seconds.append(time.perf_counter() - start)
    return {"samples_per_second": batch / min(seconds[2:]), "peak_mb": peak_mb()}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
