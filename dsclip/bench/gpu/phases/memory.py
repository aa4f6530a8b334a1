"""The planned peak against the allocator's, for each way that activations are kept."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch

from dsclip.bench.gpu.row import Facts, Row, Settings
from dsclip.bench.measure import peak_mb, reset_peak, settle
from dsclip.bench.step import make_batch, ours, planned
from dsclip.config.schema import BatchSection, Checkpointing
from dsclip.model import resolve_preset
from dsclip.plan.machine import this_machine

WAYS: tuple[tuple[Checkpointing, int], ...] = (("none", 1), ("selective", 1), ("full", 1), ("offload", 1), ("full", 2))
CAPTIONS = (23, 24)


def measure(settings: Settings) -> Iterator[Row | Facts]:
    """|planned / measured − 1| a way, and offload's peak over full's."""
    preset, n = ("demo", 8) if settings.tiny else ("ViT-L-14", 192)
    config, device = resolve_preset(preset), torch.device(settings.device)
    peaks: dict[tuple[str, int], float] = {}
    for way, k in WAYS[1:2] if settings.tiny else WAYS:
        chunk = None if way == "none" else n // k // 4
        sizes = BatchSection(n, None if k == 1 else n // k, chunk, way, accumulation="manual")
        reset_peak()
        machine = this_machine()
        name = f"{preset}, n = {n}, {way}" + (f", {k} micro-batches" if k > 1 else "")
        engine, batches = None, []
        try:
            engine = ours(config, sizes, "zero1_bf16")
            expected = planned(engine, machine, CAPTIONS)["planned_peak_mb"]
            batches = [make_batch(config, n, i, CAPTIONS).to(device) for i in range(2)]
            for i in range(4):
                engine.train_step(batches[i % 2])
            settle()
            peaks[way, k] = peak = peak_mb()
        except torch.OutOfMemoryError:
            yield Row(f"{name}: planned against measured", None, note="out of memory")
            continue
        finally:
            if engine is not None:  # also after an out-of-memory: the next way has the device to itself
                engine.close()
            engine, batches = None, []
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        note = f"{expected:,.0f} MB planned, {peak:,.0f} MB measured"
        yield Row(f"{name}: planned against measured", abs(expected / peak - 1), accept=0.08, at_most=True, note=note)
    if ("offload", 1) in peaks and ("full", 1) in peaks:
        ratio = peaks["offload", 1] / peaks["full", 1]
        yield Row(f"{preset}: offload's peak over full's", ratio, accept=1, at_most=True)
