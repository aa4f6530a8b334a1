"""Where a step's time goes: how much of it the GPU is busy, the CPU's work a block, and how often one waits for the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dsclip.bench.gpu.row import Facts, Row, Settings
from dsclip.bench.measure import settle
from dsclip.bench.step import make_batch, ours
from dsclip.config.schema import BatchSection
from dsclip.model import resolve_preset

STEPS = 2
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


def measure(settings: Settings) -> Iterator[Row | Facts]:
    """Rows for ViT-L/14 at 256 in ZeRO-1 and ZeRO-3. The profiler itself slows the CPU: busy is a lower bound."""
    preset, n = ("demo", 8) if settings.tiny else ("ViT-L-14", 256)
    config, device = resolve_preset(preset), torch.device(settings.device)
    for stage in (3,) if settings.tiny else (1, 3):
        engine = ours(config, BatchSection(n), f"zero{stage}_bf16")
        batch = make_batch(config, n, 0, (23, 24)).to(device)
        for _ in range(3):
            engine.train_step(batch)
        settle()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=kinds) as profiler:
            for _ in range(STEPS):
                engine.train_step(batch, measure=False)
            settle()
        events = list(profiler.events() or ())
        name = f"{preset}, n = {n}, ZeRO-{stage}"
        # Spans that code opened, such as the optimizer's, lie on the device too and cover the gaps between kernels.
        on_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        kernels = [(e.time_range.start, e.time_range.end) for e in on_device]
        if kernels:
            wall = max(end for _, end in kernels) - min(start for start, _ in kernels)
            yield Row(f"{name}: GPU busy", covered(kernels) / wall, accept=0.95)
        blocks = STEPS * (config.vision_layers + config.text_layers)
        cpu = sum(e.self_cpu_time_total for e in events if e.device_type == DeviceType.CPU)
        yield Row(f"{name}: CPU a block", cpu / 1e3 / blocks, "ms")
        waits = {w: sum(e.name == w for e in events) for w in WAITS}
        note = ", ".join(f"{count / STEPS:g} {w}" for w, count in waits.items() if count)
        yield Row(f"{name}: waits a step", sum(waits.values()) / STEPS, note=f"{note}; the bench waits once")
        engine.close()
        del engine


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length that spans cover together, overlaps counted once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
