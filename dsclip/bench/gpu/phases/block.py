"""One block, forward and backward: as dsclip runs it, and wholly compiled by torch with budgets of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dsclip.bench.gpu.row import Facts, Row, Settings
from dsclip.bench.measure import median_seconds, peak_mb, reset_peak
from dsclip.errors import UserError
from dsclip.model import ClipConfig, resolve_preset
from dsclip.model.blocks import Block
from dsclip.model.compiled import compile_tower
from dsclip.model.fp8 import check_fp8
from dsclip.model.layer_major import ChunkedPass

SAMPLES = {"ViT-L-14": 256, "ViT-g-14": 96}
BUDGETS = (1.0, 0.7, 0.5)  # of what autograd would keep of the whole block


@dataclass(frozen=True)
class Cost:
    """Of a forward and its backward."""

    ms: float
    mb: float


def measure(settings: Settings) -> Iterator[Row | Facts]:
    """Milliseconds and memory of each; the best budget of half the memory, and dsclip's compiled block, have lines to meet."""
    for preset, samples in {"demo": 4}.items() if settings.tiny else SAMPLES.items():
        config, costs = resolve_preset(preset), dict[str, Cost]()
        for name, run in _variants(config, settings.tiny):
            x = torch.randn(
                samples, config.image_tokens, config.vision_width, device=settings.device, dtype=torch.bfloat16
            )
            costs[name] = cost = _cost(run, x.requires_grad_(), settings.repeats)
            yield Row(f"{preset}, {name}", cost.ms, "ms", note=f"{cost.mb:,.0f} MB")
        yield _fp8(preset, config, samples, settings)
        whole, half, ours = (costs.get(n) for n in ("whole, budget 1.0", "whole, budget 0.5", "dsclip compiled, none"))
        if whole and half:
            yield Row(f"{preset}, budget 0.5: memory", half.mb / whole.mb, accept=0.6, at_most=True)
            yield Row(f"{preset}, budget 0.5: time", half.ms / whole.ms, accept=1.05, at_most=True)
        if whole and ours:
            yield Row(f"{preset}, dsclip compiled against whole: time", ours.ms / whole.ms, accept=1.03, at_most=True)


def _fp8(preset: str, config: ClipConfig, samples: int, settings: Settings) -> Row:
    """The compiled block that keeps everything, with its products in fp8; or why there is none."""
    device, name = torch.device(settings.device), f"{preset}, dsclip compiled, none, fp8"
    try:
        check_fp8(replace(config, fp8=True), device, torch.bfloat16)
    except UserError as error:
        return Row(name, None, "ms", note=str(error))
    block = _block(config, fp8=True)
    compile_tower([block], "image")
    x = torch.randn(samples, config.image_tokens, config.vision_width, device=device, dtype=torch.bfloat16)
    cost = _cost(partial(_layer_major, block, "none"), x.requires_grad_(), settings.repeats)
    return Row(name, cost.ms, "ms", note=f"{cost.mb:,.0f} MB")


def _variants(config: ClipConfig, tiny: bool) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    ways = ("none", "full") if tiny else ("none", "selective", "full", "offload")
    for compiled in (False,) if tiny else (False, True):
        for way in ways:
            block = _block(config)
            if compiled:
                compile_tower([block], "image")
            yield f"dsclip {'compiled' if compiled else 'eager'}, {way}", partial(_layer_major, block, way)
    import torch._functorch.config as functorch

    for budget in BUDGETS[:1] if tiny else BUDGETS:
        torch._dynamo.reset()
        with functorch.patch(activation_memory_budget=budget):
            yield f"whole, budget {budget}", torch.compile(_block(config), backend="aot_eager" if tiny else "inductor")


def _layer_major(block: Block, checkpointing: str, x: Tensor) -> Tensor:
    output: Tensor = block(None, x, chunked=ChunkedPass(checkpointing))[0]
    return output


def _block(config: ClipConfig, *, fp8: bool = False) -> Block:
    c = config
    block = Block(
        c.vision_width, c.vision_heads, c.vision_mlp_width, c.activation, c.layer_norm_eps, causal=False, text_layers=None,
        fp8=fp8,
    )  # fmt: skip
    return block.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def _cost(run: Callable[[Tensor], Tensor], x: Tensor, repeats: int) -> Cost:
    gradient = torch.ones_like(x)

    def both() -> None:
        run(x).backward(gradient)

    both()  # compiles, and leaves the gradients' memory behind
    reset_peak()
    before = peak_mb()
    both()
    extra = peak_mb() - before
    return Cost(1e3 * median_seconds(both, 2 * repeats, warm_up=2), extra)
