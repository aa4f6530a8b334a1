"""Attention by backend, tokens and head width, forward and backward: which backend, and whether 256 tokens beat 257."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsclip.bench.gpu.row import Facts, Row, Settings
from dsclip.bench.measure import median_seconds

BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
HEADS = 16


def measure(settings: Settings) -> Iterator[Row | Facts]:
    """Milliseconds of 64 samples × 16 heads; no lines to meet."""
    samples, backends = 64, BACKENDS
    shapes = [*product((256, 257, 264), (64, 80, 88, 104), (False,)), *product((24, 77), (64,), (True,))]
    if settings.tiny:
        samples, backends = 2, {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
        shapes = [(16, 64, False), (24, 64, True)]
    for (tokens, width, causal), (name, backend) in product(shapes, backends.items()):
        q, k, v = (
            torch.randn(samples, HEADS, tokens, width, device=settings.device, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        gradient = torch.randn_like(q)

        def both(q=q, k=k, v=v, causal=causal, gradient=gradient) -> object:  # type: ignore[no-untyped-def]
            return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=causal), (q, k, v), gradient)

        label = f"{'causal, ' if causal else ''}{tokens} tokens, heads of {width}, {name}"
        try:
            with sdpa_kernel(backend):
                yield Row(label, 1e3 * median_seconds(both, 5 * settings.repeats, warm_up=3), "ms")
        except RuntimeError as error:
            yield Row(label, None, "ms", note=f"refused: {str(error).splitlines()[0][:80]}")
