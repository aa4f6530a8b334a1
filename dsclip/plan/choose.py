"""`batch.accumulation: auto`: the fastest way through a batch that fits into memory, by the estimate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from dsclip.config.deepspeed import DsConfig
from dsclip.config.schema import BatchSection, Checkpointing, Recipe
from dsclip.distributed import Collectives
from dsclip.model import ClipConfig
from dsclip.model.trained import TrainedPart, trained_part
from dsclip.plan.estimate import Estimate, estimate
from dsclip.plan.machine import Machine, this_machine
from dsclip.plan.workload import PLAIN, Workload

SMALL_CHUNK = 4  # a chunk of c samples runs at c/(c + 4) of the speed of a large one: kernels too small for the device


def plan_recipe(
    recipe: Recipe, ds_config: DsConfig, config: ClipConfig, group: Collectives, trained: TrainedPart | None = None
) -> tuple[Recipe, Estimate]:
    """The recipe with its batch section planned for the machine of rank 0, and what a step will take. Collective.

    trained: what `trained_part` says of the recipe, where it is known already.
    """
    # Memory differs a little between ranks, and a plan must not.
    machine = group.broadcast_object(this_machine())
    work = Workload.of(recipe, trained or trained_part(config, recipe.model, recipe.objective))
    batch, found = plan_batch(config, recipe.batch, ds_config, group.world_size, machine, work)
    return replace(recipe, batch=batch), found


def plan_batch(
    config: ClipConfig, batch: BatchSection, ds_config: DsConfig, world_size: int, machine: Machine, work: Workload = PLAIN
) -> tuple[BatchSection, Estimate]:  # fmt: skip
    """The batch section with micro_batch_size, chunk_size, checkpointing and coalesce_reduction filled in, and its estimate.

    What the section sets stays. Where everything fits, there is one micro-batch and nothing is recomputed. Where nothing
    fits, the smallest is returned, and its estimate says so.
    """

    if batch.memory_gb is not None:
        machine = replace(machine, memory_gb=batch.memory_gb)

    def look(candidate: BatchSection) -> Estimate:
        return estimate(config, candidate, ds_config, world_size, machine, work)

    if batch.accumulation == "manual":
        return batch, look(batch)
    zero = ds_config["zero_optimization"]
    offloads = any((zero.get(f"offload_{x}") or {}).get("device", "none") != "none" for x in ("param", "optimizer"))
    reduces_early = world_size > 1 and zero["stage"] >= 2 and not offloads
    looks = [(c, look(c)) for c in _candidates(batch, world_size, machine.device, reduces_early)]
    fitting = [pair for pair in looks if pair[1].fits]
    if not fitting:
        return min(looks, key=lambda pair: pair[1].peak_mb)
    return max(fitting, key=lambda pair: (_speed(pair[1]), -pair[1].micro_batches))


def _speed(found: Estimate) -> float:
    return found.samples_per_second * found.chunk / (found.chunk + SMALL_CHUNK)


def _candidates(batch: BatchSection, world_size: int, device: str, reduces_early: bool) -> Iterator[BatchSection]:
    local = batch.global_batch_size // world_size
    micro_batches = [batch.micro_batch_size] if batch.micro_batch_size else list(_halves(local))
    for micro_batch in micro_batches:
        for checkpointing in _checkpointings(batch, device):
            if batch.chunk_size:
                chunks: list[int | None] = [batch.chunk_size]
            elif checkpointing == "none":
                chunks = [None]  # cutting saves nothing where everything is saved for backward
            else:
                chunks = list(_halves(micro_batch))
            coalesced = [batch.coalesce_reduction]
            if batch.coalesce_reduction is None:
                coalesced = [False, True] if reduces_early and micro_batch < local else [False]
            for chunk, coalesce in product(chunks, coalesced):
                yield replace(
                    batch,
                    micro_batch_size=None if micro_batch >= local else micro_batch,
                    chunk_size=None if chunk is None or chunk >= micro_batch else chunk,
                    checkpointing=checkpointing,
                    coalesce_reduction=coalesce,
                )


def _checkpointings(batch: BatchSection, device: str) -> list[Checkpointing]:
    if batch.checkpointing != "auto":
        return [batch.checkpointing]
    if batch.chunk_size:
        return ["full"]
    return ["none", "selective", "full", "offload"] if device == "cuda" else ["none", "selective", "full"]


def _halves(n: int) -> Iterator[int]:
    """n, n/2, n/4, … 1, rounded up."""
    while n > 1:
        yield n
        n = -(-n // 2)
    yield 1
