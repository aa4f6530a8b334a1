"""Run on every rank: bytes of ZeRO-3's collectives in one step, by number of chunks; writes one JSON file."""

import json
import sys
from collections import Counter
from dataclasses import replace

import deepspeed.comm as dist
from torch.profiler import ProfilerActivity, profile

from dsclip.config import load_ds_config
from dsclip.config.schema import BatchSection, OptimSection, Recipe, TrainSection
from dsclip.data import Batch
from dsclip.distributed import Collectives, shutdown_distributed
from dsclip.engine.build import build_model, init_distributed
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.plan.estimate import passes
from tests.distributed.exactness_worker import CONFIG, GLOBAL_BATCH, ds_config, global_batch, local_part

WIDE = replace(CONFIG, vision_width=128, vision_mlp_width=512)


EVALUATED = (("image", "", ""), ("", "image", ""), ("", "", "text image"))
KEEP = {
    "nothing": {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0},
    "until backward": {"stage3_max_reuse_distance": 10**9, "stage3_max_live_parameters": 10**9},
    "always": {"stage3_param_persistence_threshold": 10**12, "stage3_model_persistence_threshold": 10**13},
}
SCHEDULES = (
    *((name, 1, False) for name in ("zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_persist_bf16")),
    *((name, 3, True) for name in ("zero2_bf16", "zero3_bf16", "zero3_persist_bf16")),
    ("zero3_bf16", 2, False),
)


def evaluate(engine, batch: Batch, towers: str) -> None:
    if "image" in towers:
        engine.encode_image(batch.images)
    if "text" in towers:
        engine.encode_text(batch.tokens)


def bytes_per_step(
    chunk_size: int | None, micro_batches: int, keep: str, group: Collectives, evaluated: tuple[str, ...] = ("", "", "")
) -> dict:
    """evaluated: the towers that an evaluation uses before each of the three steps, the last of which is counted."""
    settings = ds_config(3, True, group.world_size)
    settings["comms_logger"] = {"enabled": True, "verbose": False, "prof_all": True, "debug": False}
    settings["zero_optimization"] |= KEEP[keep]
    micro_batch = GLOBAL_BATCH // group.world_size // micro_batches
    recipe = Recipe(
        batch=BatchSection(GLOBAL_BATCH, micro_batch, chunk_size, coalesce_reduction=keep == "always"),
        optim=OptimSection(warmup_steps=0),
        train=TrainSection(),
    )
    engine = ContrastiveEngine(recipe, settings, WIDE)
    parameters = engine.module.parameter_count()
    gathers, reductions = passes(parameters, recipe.batch, settings, group.world_size, micro_batches)
    for step in range(2):  # the first steps record ZeRO's trace
        evaluate(engine, local_part(global_batch(step), group), evaluated[step])
        engine.train_step(local_part(global_batch(step), group))
    if evaluated[2]:
        evaluate(engine, local_part(global_batch(2), group), evaluated[2])
        engine.train_step(local_part(global_batch(2), group))  # which finds the trace invalid, and records it anew
        engine.train_step(local_part(global_batch(2), group))
    dist.comms_logger.comms_dict.clear()
    engine.train_step(local_part(global_batch(2), group))
    totals = {}
    for name, sizes in dist.comms_logger.comms_dict.items():
        totals[name] = sum(size * record[0] for size, record in sizes.items())
    engine.close()
    return {
        "chunk_size": chunk_size,
        "micro_batches": micro_batches,
        "keep": keep,
        "evaluated": evaluated,
        "planned": [gathers, reductions],
        "parameter_bytes": 2 * parameters,
        "bytes": totals,
    }


def collectives_per_step(name: str, micro_batches: int, coalesce: bool, group: Collectives) -> dict:
    """How many collectives a step of a packaged configuration takes, dsclip's own included, as torch dispatches them."""
    micro_batch = GLOBAL_BATCH // group.world_size // micro_batches
    recipe = Recipe(
        batch=BatchSection(GLOBAL_BATCH, micro_batch, coalesce_reduction=coalesce),
        optim=OptimSection(warmup_steps=0),
        train=TrainSection(),
    )
    engine = ContrastiveEngine(recipe, load_ds_config(name, recipe, group.world_size), WIDE)
    for step in range(3):
        if step == 2:  # the first steps record ZeRO's trace
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                engine.train_step(local_part(global_batch(step), group))
        else:
            engine.train_step(local_part(global_batch(step), group))
    counted = Counter(event.name for event in profiler.events() if event.name.startswith("c10d::"))
    engine.close()
    return {
        "ds_config": name,
        "micro_batches": micro_batches,
        "coalesce": coalesce,
        "collectives": dict(counted),
        "blocks": WIDE.vision_layers + WIDE.text_layers,
    }


def share_held_while_building(group: Collectives) -> float:
    """Largest share of a parameter that this rank holds right after construction under zero.Init."""
    model = build_model(WIDE, ds_config(3, True, group.world_size), seed=0)
    held = [(p.numel() + p.ds_tensor.numel()) / p.ds_numel for p in model.parameters() if p.ds_numel > 1000]
    return max(held)


def main(out: str) -> None:
    init_distributed()
    group = Collectives.current()
    results = [bytes_per_step(size, 1, "nothing", group) for size in (None, 3, 1)]
    results += [bytes_per_step(None, micro_batches, keep, group) for micro_batches in (2, 3) for keep in KEEP]
    results.append(bytes_per_step(None, 1, "until backward", group))
    for evaluated in EVALUATED:
        results += [bytes_per_step(None, micro_batches, "until backward", group, evaluated) for micro_batches in (1, 2)]
    counts = [collectives_per_step(*schedule, group) for schedule in SCHEDULES]
    share = share_held_while_building(group)
    results = [result | {"share_held_while_building": share} for result in results]
    if group.rank == 0:
        with open(out, "w") as f:
            json.dump({"bytes": results, "counts": counts}, f)
    shutdown_distributed()


if __name__ == "__main__":
    main(sys.argv[1])
