"""Optimizer steps of one trainer on random images and captions of real length. `python -m dsclip.bench.step JSON`."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the launcher does; before torch allocates

import torch

from dsclip.bench.measure import peak_mb, reset_peak, seconds_of
from dsclip.bench.peers import PEERS
from dsclip.config.schema import BatchSection, Checkpointing, OptimSection, Recipe
from dsclip.config.train_section import TrainSection
from dsclip.data import Batch
from dsclip.distributed import Collectives
from dsclip.engine.cpu_bf16 import speed_up_bf16
from dsclip.model import Clip, ClipConfig, resolve_preset
from dsclip.model.captions import padded_length
from dsclip.model.flops import forward_flops
from dsclip.plan import Machine, estimate, plan_recipe
from dsclip.plan.advice import describe_choice
from dsclip.plan.machine import this_machine
from dsclip.plan.workload import Workload

if TYPE_CHECKING:  # importing it takes DeepSpeed's seconds, which peers are spared
    from dsclip.engine.contrastive import ContrastiveEngine

CAPTION_TOKENS = (8, 22)  # COCO's and web captions, begin and end token included


def make_batch(config: ClipConfig, n: int, seed: int, caption_tokens: tuple[int, int] = CAPTION_TOKENS) -> Batch:
    """n samples that the seed draws: images uint8, captions whose end token stands at a ≤ place < b of caption_tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(*caption_tokens, (n,), generator=generator)
    most = config.eot_token_id - 1 if config.text_pool == "end" else config.vocab_size
    tokens = torch.randint(1, most, (n, config.context_length), generator=generator)
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


def planned(
    engine: ContrastiveEngine, machine: Machine, caption_tokens: tuple[int, int] = CAPTION_TOKENS
) -> dict[str, Any]:
    """What a plan made before the engine was there says of its step, for captions as long as these."""
    tokens = padded_length(caption_tokens[1], engine.config.context_length)
    work = Workload(optim=engine.recipe.optim, text_tokens=tokens)
    plan = estimate(engine.config, engine.recipe.batch, engine.ds_config, 1, machine, work)
    return {
        "planned_peak_mb": plan.peak_mb, "schedule": describe_choice(plan), "checkpointing": plan.checkpointing,
        "recomputed_gflops_per_sample": plan.recomputed_gflops_per_sample,
    }  # fmt: skip


def text_lengths(module: Clip, step: Callable[[], object]) -> dict[int, float]:
    """{tokens: share of the captions that the text tower computed at that length} in one step."""
    counted: Counter[int] = Counter()

    def count(_: torch.nn.Module, inputs: tuple[object, ...]) -> None:
        for chunk in inputs:
            if isinstance(chunk, torch.Tensor) and chunk.ndim == 3:
                counted[chunk.shape[1]] += len(chunk)

    hook = module.text.blocks[0].register_forward_pre_hook(count)
    step()
    hook.remove()
    return {tokens: captions / counted.total() for tokens, captions in sorted(counted.items())}


def step_flops(config: ClipConfig, lengths: Mapping[int, float]) -> float:
    """Operations of a sample's forward and backward, recomputation not counted, with texts of these lengths."""
    image, _ = forward_flops(config)
    return 3 * (image + sum(share * forward_flops(config, tokens)[1] for tokens, share in lengths.items()))


def measure(
    trainer: str, preset: str, batch: int, steps: int, kind: str, micro_batch: int | None = None,
    chunk_size: int | None = None, checkpointing: Checkpointing = "auto",
    ds_config: str = "zero1_bf16", caption_tokens: tuple[int, int] = CAPTION_TOKENS,
) -> dict[str, Any]:  # fmt: skip
    """{"samples_per_second": of the median step after two to warm up, "seconds": of each, "peak_mb"}.

    Of dsclip also what was planned, and "gflops_per_sample" with the text tokens that the step really computed.
    kind: plain | compiled | accumulated | auto, compiled of peers only and auto of dsclip only. accumulated: a peer's
    step in micro-batches of `micro_batch` samples, dsclip's in chunks of `chunk_size`. Batches lie on the device before
    the clock starts.
    """
    speed_up_bf16()  # for peers too
    config = resolve_preset(preset)
    extra: dict[str, Any] = {}
    step: Callable[[Batch], object]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = [make_batch(config, batch, number, caption_tokens).to(device) for number in range(2)]
    reset_peak()
    if trainer == "dsclip":
        sizes = BatchSection(batch)
        if kind != "auto":
            checkpointing = checkpointing if chunk_size else "none"
            sizes = BatchSection(batch, None, chunk_size, checkpointing, accumulation="manual")
        machine = this_machine()
        engine = ours(config, sizes, ds_config)
        step, extra = engine.train_step, planned(engine, machine, caption_tokens)
        lengths = text_lengths(engine.module, lambda: step(batches[0]))
        extra |= {"gflops_per_sample": step_flops(config, lengths) / 1e9, "text_lengths": lengths}
    else:
        step = PEERS[trainer](config, micro_batch, compiled=kind == "compiled").step
        batches = [replace(b, tokens=b.tokens.to(device)) for b in batches]
        step(batches[0])
    turn = iter(range(steps + 1))
    seconds = seconds_of(lambda: step(batches[next(turn) % 2]), steps)
    rate = batch / statistics.median(seconds)
    found = {"samples_per_second": rate, "seconds": seconds, "peak_mb": peak_mb(), **extra}
    if trainer == "dsclip":
        engine.close()
    return found


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
