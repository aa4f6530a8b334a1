"""Other trainers in the same run, at the same batch: plain, compiled, and accumulated."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch

from dsclip.bench.gpu.row import Facts, Row, Settings
from dsclip.bench.peers import PEERS, installed_peers
from dsclip.bench.step import measure as measure_step

KINDS = ("plain", "compiled", "accumulated")
ACCUMULATED_LINE = 1.3


def measure(settings: Settings) -> Iterator[Row | Facts]:
    """Samples/s of dsclip and each peer; dsclip over HF's compiled step, and over the best accumulated one, have lines.

    Where a trainer runs out of memory its batch is halved, and the row says so.
    """
    o = settings.options
    preset, n = ("demo", 8) if settings.tiny else (o["preset"], o["batch"])
    rates: dict[tuple[str, str], float] = {}
    for trainer in ("dsclip", *PEERS):
        for kind in ("auto", "accumulated") if trainer == "dsclip" else KINDS:
            name = f"{preset}, {trainer}, {kind}"
            if trainer != "dsclip" and trainer not in installed_peers():
                yield Row(name, None, "samples/s", note="not installed")
                continue
            if settings.tiny and kind == "compiled":
                yield Row(name, None, "samples/s", note="compiled on a GPU only")
                continue
            found, size = _largest(trainer, preset, n, kind, settings.repeats)
            if found is None:
                yield Row(name, None, "samples/s", note=f"out of memory, also at {size}")
                continue
            rates[trainer, kind] = rate = found["samples_per_second"]
            yield Row(name, rate, "samples/s", note=f"n = {size}, {found['peak_mb']:,.0f} MB")
    if ("dsclip", "auto") in rates and ("transformers", "compiled") in rates:
        ratio = rates["dsclip", "auto"] / rates["transformers", "compiled"]
        yield Row(f"{preset}, dsclip / compiled transformers", ratio, "×", accept=o["accept"])
    best = max(
        (rate for (trainer, kind), rate in rates.items() if trainer != "dsclip" and kind == "accumulated"), default=None
    )
    if best and ("dsclip", "accumulated") in rates:
        ratio = rates["dsclip", "accumulated"] / best
        yield Row(f"{preset}, dsclip / best peer, accumulated", ratio, "×", accept=ACCUMULATED_LINE)


def _largest(trainer: str, preset: str, n: int, kind: str, repeats: int) -> tuple[dict[str, Any] | None, int]:
    """What was measured at the largest of n, n/2, n/4 that memory allows, and that size."""
    size = n
    for size in (n, n // 2, n // 4):
        part: dict[str, Any] = (
            {"chunk_size" if trainer == "dsclip" else "micro_batch": size // 4} if kind == "accumulated" else {}
        )
        try:
            return measure_step(trainer, preset, size, repeats, kind, caption_tokens=(23, 24), **part), size
        except torch.OutOfMemoryError:
            pass  # the error's frames hold the tensors: they go with it
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return None, size
