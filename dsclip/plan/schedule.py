"""A step simulated layer by layer: what the device computes, what travels meanwhile, and where one waits for the other.

Two queues, each in its own order: the device's products and the collectives. ZeRO-3 gathers a layer's weights up to the
prefetch bucket ahead of the layer that computes; gradients are reduced when a bucket is full; what is left of both after the
last product, and what follows the optimizer's step, the device waits for. The loss's products and the optimizer are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from dsclip.config.deepspeed import DsConfig
from dsclip.model import Clip, ClipConfig
from dsclip.model.flops import forward_flops
from dsclip.plan.interconnect import Interconnect

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Part:
    """A layer. flops: of one sample's forward."""

    parameters: int
    flops: float


@dataclass
class Timeline:
    """A step. waits: seconds by reason; seconds: of the whole step; busy: of products."""

    seconds: float = 0.0
    busy: float = 0.0
    travelling: float = 0.0
    waits: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def compute(self, seconds: float, ready: float, reason: str) -> float:
        """Products that can't begin before `ready`; returns when they begin."""
        self.waits[reason] += max(0.0, ready - self.seconds)
        begin = max(self.seconds, ready)
        self.seconds = begin + seconds
        self.busy += seconds
        return begin

    def send(self, seconds: float, asked: float) -> float:
        """A collective that is asked for at a time and begins after those before it; returns when it is done."""
        self.travelling = max(self.travelling, asked) + seconds
        return self.travelling


@dataclass(frozen=True)
class Way:
    """How a step goes: micro-batches, recomputation in forwards of a block, where weights and gradients are."""

    local_batch: int
    micro_batches: int
    recomputed: float
    gathers_layers: bool  # ZeRO-3 without persisted weights
    keeps: bool  # weights until the micro-batch's backward
    coalesced: bool
    bucket: float  # numbers
    prefetch: float  # numbers
    wire: int  # bytes of a reduced number


def way(
    ds_config: DsConfig, parameters: int, local_batch: int, micro_batches: int, recomputed: float, coalesced: bool
) -> Way:
    """What a configuration with its persistence resolved means for the order of a step."""
    zero = ds_config["zero_optimization"]
    persisted = zero.get("stage3_param_persistence_threshold", 1e5) >= parameters
    live = min(zero.get("stage3_max_live_parameters", 1e9), zero.get("stage3_max_reuse_distance", 1e9))
    # ZeRO-1 reduces after the last backward, in one go.
    bucket = float("inf") if zero["stage"] == 1 else float(zero.get("reduce_bucket_size", 5e8))
    return Way(
        local_batch, micro_batches, recomputed, zero["stage"] == 3 and not persisted, live >= parameters,
        coalesced or zero["stage"] == 1, bucket, float(zero.get("stage3_prefetch_bucket_size", 5e7)),
        FP32 if ds_config.get("communication_data_type", "fp32") == "fp32" else BF16,
    )  # fmt: skip


def simulate(
    parts: Sequence[Part], w: Way, flops_per_second: float, net: Interconnect, feature_bytes: float = 0.0
) -> Timeline:
    """One step. feature_bytes: of both sides' features of the global batch, which all ranks gather for the loss."""
    time, k = Timeline(), w.micro_batches
    rate = w.local_batch / k / flops_per_second  # seconds of one FLOP of each sample
    there = False  # the weights, whole, kept since a forward

    def forward() -> None:
        nonlocal there
        gather = w.gathers_layers and not there
        _through(time, parts, [p.flops * rate for p in parts], w, net, gather=gather, reason="weights, forward")
        there = w.keeps

    def backward(last: bool) -> None:
        nonlocal there
        gather, reduces = w.gathers_layers and not there, last or not w.coalesced
        seconds = [p.flops * rate * (2 + w.recomputed) for p in reversed(parts)]
        _through(time, parts[::-1], seconds, w, net, gather=gather, reason="weights, backward", reduces=reduces)
        there = False

    for _ in range(k):
        forward()
    time.compute(0.0, time.send(net.seconds(feature_bytes), time.seconds), "features")
    for number in range(k):
        if number:
            forward()
        backward(number == k - 1)
    time.compute(0.0, time.travelling, "gradients, after backward")
    if not w.gathers_layers:  # weights are whole on every rank, and were just updated in parts
        whole = BF16 * sum(p.parameters for p in parts)
        time.compute(0.0, time.send(net.seconds(whole), time.seconds), "weights, after the update")
    return time


def _through(
    time: Timeline, parts: Sequence[Part], seconds: Sequence[float], w: Way, net: Interconnect, *, gather: bool, reason: str,
    reduces: bool = False,
) -> None:  # fmt: skip
    """One pass over layers in the order in which they compute."""
    arrived, asked, filled = dict[int, float](), 0, 0
    for number, part in enumerate(parts):
        if gather:
            ahead = sum(p.parameters for p in parts[number + 1 : asked])
            while asked < len(parts) and (asked <= number or ahead + parts[asked].parameters <= w.prefetch):
                ahead += parts[asked].parameters if asked > number else 0
                arrived[asked] = time.send(net.seconds(BF16 * parts[asked].parameters), time.seconds)
                asked += 1
        time.compute(seconds[number], arrived.get(number, 0.0), reason)
        filled += part.parameters
        if reduces and (filled >= w.bucket or number == len(parts) - 1):
            time.send(net.seconds(w.wire * filled), time.seconds)
            filled = 0


@cache
def parts_of(config: ClipConfig, text_tokens: int | None) -> tuple[Part, ...]:
    """The layers of both towers in the order of a forward; a tower's operations are spread evenly over its blocks."""
    with torch.device("meta"):
        model = Clip(config)
    found: list[Part] = []
    for tower, flops in zip((model.visual, model.text), forward_flops(config, text_tokens), strict=True):
        count = {
            layer: sum(p.numel() for p in layer.parameters()) for layer in (tower.embed, *tower.blocks, tower.head)
        }
        found += [
            Part(n, flops / len(tower.blocks) if layer in list(tower.blocks) else 0.0) for layer, n in count.items()
        ]
    return tuple(found)
