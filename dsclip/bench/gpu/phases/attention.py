"""Attention by backend in the shapes of the presets, forward and backward: which backend, and whether 256 tokens beat 257."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsclip.bench.gpu.row import Facts, Row, Settings
from dsclip.bench.measure import median_seconds
from dsclip.model.attention import BACKENDS, attention
from dsclip.model.config import ClipConfig
from dsclip.model.presets import PRESETS

SAMPLES = 64
TEXT_TOKENS = (24, 77)  # of web captions that are cut, and of whole contexts
# Of output and gradients in bf16, relative to float64 by norm. A number is rounded to 2⁻⁹ of itself, here a few times.
LIMIT = 2e-2


@dataclass(frozen=True)
class Shape:
    """Of one block's attention."""

    tokens: int
    heads: int
    head_width: int
    causal: bool

    def __str__(self) -> str:
        causal = "causal, " if self.causal else ""
        return f"{causal}{self.tokens} tokens, {self.heads} heads of {self.head_width}"


def shapes(config: ClipConfig, text_tokens: tuple[int, ...]) -> Iterator[Shape]:
    """The image tower's with a class token and without, and the text tower's."""
    for tokens in (1 + config.patches, config.patches):
        yield Shape(tokens, config.vision_heads, config.vision_width // config.vision_heads, False)
    for tokens in text_tokens:
        yield Shape(tokens, config.text_heads, config.text_width // config.text_heads, True)


def measure(settings: Settings) -> Iterator[Row | Facts]:
    """Milliseconds of 64 samples a shape and backend, and each backend's error, which has a line to meet."""
    if settings.tiny:
        samples, found = 2, dict.fromkeys(shapes(PRESETS["demo"], (16,)))
    else:
        samples = SAMPLES
        found = dict.fromkeys(s for name, c in PRESETS.items() if name != "demo" for s in shapes(c, TEXT_TOKENS))
    worst = dict[str, float]()
    for shape in found:
        exact = both("math", *_inputs(shape, 2, settings.device, torch.float64), causal=shape.causal)
        for backend in BACKENDS:
            try:
                inputs = _inputs(shape, 2, settings.device, torch.bfloat16)
                error = max(map(_relative, both(backend, *inputs, causal=shape.causal), exact))
                worst[backend] = max(error, worst.get(backend, 0.0))
                q, k, v, gradient = _inputs(shape, samples, settings.device, torch.bfloat16)
                seconds = median_seconds(
                    lambda b=backend, s=shape, q=q, k=k, v=v, g=gradient: both(b, q, k, v, g, causal=s.causal),  # type: ignore[misc]
                    5 * settings.repeats,
                    warm_up=3,
                )
            except RuntimeError as problem:
                yield Row(f"{shape}, {backend}", None, "ms", note=f"refused: {str(problem).splitlines()[0][:80]}")
            else:
                yield Row(f"{shape}, {backend}", 1e3 * seconds, "ms")
    for backend, error in worst.items():
        yield Row(f"{backend}: error against float64", error, accept=LIMIT, at_most=True, exactness=True)


def _inputs(shape: Shape, samples: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and the output's gradient, the same numbers in every dtype: those of bf16."""
    generator = torch.Generator().manual_seed(0)
    size = (4, samples, shape.heads, shape.tokens, shape.head_width)
    numbers = torch.randn(size, generator=generator).to(torch.bfloat16).to(device, dtype)
    q, k, v, gradient = (x.detach().requires_grad_() for x in numbers)
    return q, k, v, gradient.detach()


def both(backend: str, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, *, causal: bool) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k, v."""
    output = attention(q, k, v, causal=causal, backend=backend)
    return output, *torch.autograd.grad(output, (q, k, v), gradient)


def _relative(x: Tensor, exact: Tensor) -> float:
    return float((x.detach().double() - exact.detach()).norm() / exact.detach().norm())
