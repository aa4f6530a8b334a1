"""One estimate: peak memory by part, gathers and bytes, operations, samples a second."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from dsclip.config.deepspeed import DsConfig, resolve_persistence
from dsclip.config.schema import BatchSection, ModelSection
from dsclip.config.train_section import saves_in_background
from dsclip.model import Clip, ClipConfig
from dsclip.model.flops import experts_last_products, forward_flops
from dsclip.model.trained import TrainedPart, trained_part
from dsclip.plan.machine import USABLE, Machine
from dsclip.plan.memory import BF16, FP32, Encoded, activation_bytes, copy_bytes, image_bytes, loss_bytes, state_bytes
from dsclip.plan.optimizer_state import kept_bytes, step_bytes
from dsclip.plan.workload import PLAIN, Workload

HOST_BYTES_PER_SECOND = 25e9  # between GPU and pinned memory over PCIe 4, to and fro at a time
# Of a forward's products, those that are computed again for the gradients; full: all but each block's last.
RECOMPUTED = {"none": 0.0, "selective": 1 / 3, "full": 2 / 3, "offload": 2 / 3}


def recomputed(checkpointing: str, device: str) -> float:
    """The share of a forward computed again. On a GPU blocks are compiled: `selective` keeps every product's result there."""
    return 0.0 if checkpointing == "selective" and device == "cuda" else RECOMPUTED[checkpointing]


@dataclass(frozen=True)
class Estimate:
    """What a step takes on one rank. Sizes in MB of 10⁶ bytes; gathers in passes over all parameters."""

    parts: dict[str, float]
    fits: bool
    micro_batch: int
    chunk: int
    checkpointing: str
    micro_batches: int
    gathers_per_step: int
    reductions_per_step: int
    gathered_mb_per_step: float
    reduced_mb_per_step: float
    gflops_per_sample: float
    recomputed_gflops_per_sample: float
    samples_per_second: float
    host_mb: float = 0.0  # of a GPU's rank: the copy of a checkpoint that is written in the background

    @property
    def peak_mb(self) -> float:
        """The sum of the parts."""
        return sum(self.parts.values())


def estimate(
    config: ClipConfig, batch: BatchSection, ds_config: DsConfig, world_size: int, machine: Machine, work: Workload = PLAIN
) -> Estimate:  # fmt: skip
    """The estimate for one rank."""
    loss, optim, text_tokens = work.loss, work.optim, work.text_tokens
    part = work.trained or whole_model(config)
    parameters, (_, block) = part.of, parameter_counts(config)
    micro_batch, chunk, checkpointing = batch.sizes(world_size)
    local = batch.global_batch_size // world_size
    micro_batches = -(-local // micro_batch)
    encoded = Encoded.of(loss, work.further_views)
    saved, working = activation_bytes(
        config, micro_batch, chunk, checkpointing, machine.device, text_tokens, encoded, part.locked
    )
    ds_config = resolve_persistence(ds_config, batch)
    kept, average = kept_bytes(part.parameters, part.matrices, optim)
    state = state_bytes(parameters, block, ds_config, world_size, machine.device, part.parameters, kept)
    if average:
        state["weight_average"] = average / world_size if state["optimizer"] else 0
    if batch.coalesce_reduction:
        state["gradients"] += (BF16 + FP32) * part.parameters  # of a micro-batch, and their sum
    losses = loss_bytes(config, batch.global_batch_size, world_size, loss, machine.device, encoded)
    if loss.queue_momentum is not None:
        sharded = ds_config["zero_optimization"]["stage"] == 3
        state["momentum_encoder"] = parameters * (FP32 + BF16) / (world_size if sharded else 1)
    # The graph's peak is where backward begins, or the loss before it; the reduction's is where it ends, and then the step's.
    reduction = max(state.pop("reduction"), step_bytes(part.parameters / world_size, optim))
    at_work = max(working, losses.pop("loss_tiles"))
    activations = {"activations": saved, "working_set": at_work, "reduction": max(0, reduction - saved - at_work)}
    copied = 0.0
    if saves_in_background(work.save_in_background, machine.device):
        stage = ds_config["zero_optimization"]["stage"]
        copied = copy_bytes(state, parameters, kept, losses["queue"], stage, world_size)
    sizes = {
        "process": machine.base_gb * 1e9,
        **state,
        "images": image_bytes(config, local * encoded.images),
        **losses,
        **activations,
        **({"checkpoint_copy": copied} if copied and machine.device == "cpu" else {}),
    }
    parts = {name: size / 1e6 for name, size in sizes.items()}

    gathers, reductions = passes(parameters, batch, ds_config, world_size, micro_batches)
    wire = FP32 if ds_config.get("communication_data_type", "fp32") == "fp32" else BF16
    gathered, reduced = gathers * BF16 * parameters, reductions * wire * part.parameters
    forward, towers, layers, backward = operations(config, text_tokens, part, encoded)
    again = layers * recomputed(checkpointing, machine.device)
    if checkpointing != "none":
        again += (encoded.texts + encoded.hard) * experts_last_products(config, text_tokens)
    again += towers * (micro_batches - 1) / micro_batches
    if loss.queue_momentum is not None:  # the average of the weights encodes each pair once more, without a graph
        forward += sum(forward_flops(config, text_tokens))
    seconds = local * (forward + backward + again) / (machine.tflops * 1e12 * machine.efficiency)
    seconds += (gathered + reduced) / (machine.gigabytes_per_second * 1e9) if world_size > 1 else 0
    if checkpointing == "offload" and machine.device == "cuda":
        inputs, _ = activation_bytes(config, local, chunk, "full", "cuda", text_tokens, encoded, part.locked)
        seconds += 2 * inputs / HOST_BYTES_PER_SECOND
    return Estimate(
        parts, sum(parts.values()) <= USABLE * machine.memory_gb * 1e3, micro_batch, chunk, checkpointing, micro_batches, gathers,
        reductions, gathered / 1e6, reduced / 1e6, (forward + backward) / 1e9, again / 1e9, batch.global_batch_size / seconds,
        copied / 1e6 if machine.device == "cuda" else 0.0,
    )  # fmt: skip


def passes(
    parameters: int, batch: BatchSection, ds_config: DsConfig, world_size: int, micro_batches: int
) -> tuple[int, int]:
    """(all-gathers, gradient reductions) of a step, in passes over all parameters.

    ZeRO-3 gathers a block for each forward and each backward: 3k − 1; k where weights are kept until a backward, and 1 with
    persisted parameters. ZeRO-1 and 2 gather once, after the optimizer's step.
    """
    if world_size == 1:
        return 0, 0
    zero = ds_config["zero_optimization"]
    reductions = 1 if zero["stage"] == 1 or batch.coalesce_reduction else micro_batches
    if zero["stage"] < 3:
        return 1, reductions
    if zero.get("stage3_param_persistence_threshold", 1e5) >= parameters:
        return 1, reductions
    keeps = min(zero.get("stage3_max_live_parameters", 1e9), zero.get("stage3_max_reuse_distance", 1e9)) >= parameters
    return (micro_batches if keeps else 3 * micro_batches - 1), reductions


def operations(
    config: ClipConfig, text_tokens: int | None, part: TrainedPart, encoded: Encoded
) -> tuple[float, float, float, float]:
    """FLOPs of a sample: (forward, of these towers that have a graph, layers that have one, backward).

    Backward of a layer is a forward for its input's gradient, and one for its weights' as far as they are trained; a locked layer
    has none. Layers count alike.
    """
    of_image, of_text = forward_flops(config, text_tokens)
    forwards = (encoded.images * of_image, (encoded.texts + encoded.hard) * of_text)
    layers = (config.vision_layers + 2, config.text_layers + 2)
    with_graph = [f * (1 - locked / n) for f, n, locked in zip(forwards, layers, part.locked, strict=True)]
    backward = sum(f * (1 + share) for f, share in zip(with_graph, part.shares, strict=True))
    towers = sum(f for f, above in zip(forwards, with_graph, strict=True) if above > 0)
    return sum(forwards), towers, sum(with_graph), backward


@cache
def whole_model(config: ClipConfig) -> TrainedPart:
    """Of a run that trains everything."""
    return trained_part(config, ModelSection())


@cache
def parameter_counts(config: ClipConfig) -> tuple[int, int]:
    """(of both towers, of the largest block)."""
    with torch.device("meta"):
        model = Clip(config)
    blocks = [sum(p.numel() for p in block.parameters()) for t in (model.visual, model.text) for block in t.blocks]
    return model.parameter_count(), max(blocks)
