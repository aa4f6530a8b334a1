"""What to change when a batch doesn't fit, each suggestion tried on the estimate first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from dsclip.config.deepspeed import DsConfig
from dsclip.config.schema import BatchSection
from dsclip.model import ClipConfig
from dsclip.plan.choose import plan_batch
from dsclip.plan.estimate import Estimate
from dsclip.plan.machine import Machine
from dsclip.plan.workload import PLAIN, Workload


def advice(
    config: ClipConfig, batch: BatchSection, ds_config: DsConfig, world_size: int, machine: Machine, work: Workload = PLAIN
) -> list[str]:  # fmt: skip
    """Changes after which the batch fits, with the peak each leads to; the least first. Empty if none is known."""

    def peak(
        new_batch: BatchSection, new_ds_config: DsConfig = ds_config, ranks: int = world_size, new_work: Workload = work
    ) -> Estimate:  # fmt: skip
        return plan_batch(config, new_batch, new_ds_config, ranks, machine, new_work)[1]

    free = replace(batch, micro_batch_size=None, chunk_size=None, checkpointing="auto", accumulation="auto")
    stage_3 = _with(ds_config, stage=3)
    offloaded = _with(stage_3, offload_optimizer={"device": "cpu"})
    zero = ds_config["zero_optimization"]
    tries: dict[str, Callable[[], Estimate]] = {
        "leave micro_batch_size, chunk_size and checkpointing to accumulation: auto": partial(peak, free)
    }
    loss = work.loss
    if world_size > 2 and loss.gather == "all" and loss.plugin is None:
        tries["features of other ranks one rank at a time: loss.gather=ring"] = partial(
            peak, free, new_work=replace(work, loss=replace(loss, gather="ring"))
        )
    if zero["stage"] < 3:
        tries["shard the parameters: ds_configs/zero3_bf16.json"] = partial(peak, free, stage_3)
    small = 50_000_000  # a tenth of DeepSpeed's default
    buckets = _with(ds_config, reduce_bucket_size=small)
    if zero.get("reduce_bucket_size", 5e8) > small:
        tries[f"smaller reduction buckets: zero_optimization.reduce_bucket_size {small} in the JSON"] = partial(
            peak, free, buckets
        )
    if machine.device == "cuda":  # a CPU's ranks share one memory, in which the optimizer is already
        if not zero.get("offload_optimizer") and work.optim.name == "adamw":
            offload = "keep the optimizer in host memory: ds_configs/zero3_offload_bf16.json"
            tries[offload] = partial(peak, free, offloaded)
        for factor in (2, 4, 8, 16, 32):
            ranks = world_size * factor
            if batch.global_batch_size % ranks == 0:
                tries[f"{ranks} GPUs with ZeRO-3"] = partial(peak, free, stage_3, ranks)
    found = []
    for change, attempt in tries.items():
        result = attempt()
        if result.fits:
            found.append(f"{change} ({_peak(result)})")
        if len(found) == 3:
            break
    for size in _smaller_batches(batch.global_batch_size, world_size):
        result = peak(replace(free, global_batch_size=size))
        if result.fits:
            found.append(f"a global batch of {size}, with fewer negatives ({_peak(result)})")
            break
    return found


def _smaller_batches(batch: int, world_size: int) -> Iterator[int]:
    """The batch halved again and again, in sizes that the ranks can share."""
    local = batch // world_size
    while local > 1:
        local //= 2
        yield local * world_size


def _peak(result: Estimate) -> str:
    return f"{result.peak_mb / 1e3:.1f} GB: {describe_choice(result)}"


def describe_choice(found: Estimate) -> str:
    """How a batch goes through the towers, in a few words."""
    whole = f"{found.micro_batch} samples at once"
    parts = f"{found.micro_batches} micro-batches of {found.micro_batch}" if found.micro_batches > 1 else whole
    chunk = f", chunks of {found.chunk}" if found.chunk < found.micro_batch else ""
    return f"{parts}{chunk}, checkpointing {found.checkpointing}"


def _with(ds_config: DsConfig, **zero: Any) -> DsConfig:
    changed = copy.deepcopy(ds_config)
    changed["zero_optimization"] |= zero
    return changed
