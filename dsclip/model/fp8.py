"""Linear layers whose products are computed in fp8, with scales of their own for every row.

Shapes: M rows (tokens), K inputs, N outputs. Numbers are e4m3 (Micikevicius et al. 2022: 4 bits of exponent, 3 of mantissa,
at most 448). A row's scale makes its largest number 448, so a sample's result depends on no other sample of its chunk.
Forward and the gradient of the input are fp8 products, summed up in float32; that of the weight is one in the layer's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsclip.errors import UserError
from dsclip.model.config import ClipConfig

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
LEAST_SCALE = 1e-12  # of a row of zeros
MULTIPLE = 16  # of K and N, which the kernels take
CAPABILITY = (8, 9)  # of NVIDIA's GPUs, from which on there are fp8 products


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor, *, product_left_out: bool = False) -> Tensor:
    """x·Wᵀ + b of x [..., K], W [N, K] and b [N], in x's dtype, [..., N].

    product_left_out: zero in forward, for the sake of the graph alone; gradients don't depend on what it gave.
    """
    run: Callable[..., Tensor] = _Fp8Linear.apply
    return run(x, weight, bias, product_left_out)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, product_left_out: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        if product_left_out:
            return x.new_zeros(()).expand(*x.shape[:-1], len(weight))
        product = fp8_product(x.reshape(-1, x.shape[-1]), weight)
        return (product + bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        return (
            fp8_product(flat, weight.T).view(x.shape) if for_x else None,
            flat.T @ x.reshape(len(flat), -1) if for_weight else None,
            flat.sum(dim=0) if for_bias else None,
            None,
        )


def fp8_product(a: Tensor, b: Tensor) -> Tensor:
    """a·bᵀ of a [M, K] and b [N, K], rounded to e4m3 by rows, in a's dtype, [M, N]. On a CPU the same numbers, emulated."""
    (a8, scale_a), (b8, scale_b) = by_rows(a), by_rows(b)
    if a.device.type == "cuda":
        return torch._scaled_mm(a8, b8.T, scale_a=scale_a, scale_b=scale_b.T, out_dtype=a.dtype)
    wide = scale_a.dtype
    return ((a8.to(wide) * scale_a) @ (b8.to(wide) * scale_b).T).to(a.dtype)


def by_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, C] as (e4m3 [R, C], scale [R, 1] in float32 or wider): x ≈ e4m3·scale. A row that isn't finite stays so."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=LEAST_SCALE)
    # Rounding may leave a number above 448, which e4m3 has as NaN; clamp leaves NaN alone, and ∞/∞ is NaN.
    return (wide / scale).clamp(-LARGEST, LARGEST).to(E4M3).contiguous(), scale


def check_fp8(config: ClipConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError, in one line, where `model.fp8` can't be had."""
    check_fp8_shapes(config)
    if config.fp8 and (problem := _problem_of_device(device, dtype)):
        raise UserError(f"model.fp8: {problem}. Set model.fp8=false")


def check_fp8_shapes(config: ClipConfig) -> None:
    """The part of it that needs no device."""
    problem = None
    if config.vision_layers < 3:
        problem = (
            f"the image tower has {config.vision_layers} blocks, and the first and the last stay in bf16: none is left"
        )
    elif config.vision_width % MULTIPLE or config.vision_mlp_width % MULTIPLE:
        problem = f"model.vision_width and model.vision_mlp_width must be multiples of {MULTIPLE}"
    if config.fp8 and problem:
        raise UserError(f"model.fp8: {problem}. Set model.fp8=false")


def _problem_of_device(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"fp8 products need an NVIDIA GPU of compute capability {'.'.join(map(str, CAPABILITY))} or later, and this is a CPU"
    if dtype != torch.bfloat16:
        return "it needs bf16, which the DeepSpeed configuration turns off"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"{name} has compute capability {capability[0]}.{capability[1]}, and fp8 products need 8.9 or later"
    try:
        x, weight = (torch.ones(rows, MULTIPLE, device=device, dtype=dtype) for rows in (32, 2 * MULTIPLE))
        fp8_product(x, weight)
    except (RuntimeError, AttributeError) as error:
        return f"this torch ({torch.__version__}) has no fp8 product of rows on {name} ({str(error).splitlines()[0]})"
    return None
