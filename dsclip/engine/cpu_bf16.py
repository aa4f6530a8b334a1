"""Matrix products in bf16 on CPU cores that have no bf16 instructions: computed in fp32, rounded once.

Without AVX-512 bf16 or AMX, torch multiplies bf16 matrices 10 to 60 times as slowly as fp32 ones. The result is the same
up to the order of the sum: either way products are added in fp32 and rounded to bf16 at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")  # what linear layers, matmul and their gradients end in


def speed_up_bf16() -> None:
    """Lets this process's bf16 matrix products on the CPU go through fp32, where its cores are better at that."""
    if not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        multiply_in_fp32()


@lru_cache(maxsize=1)
def multiply_in_fp32() -> torch.library.Library:
    """Replaces the kernels, below autograd, which notices nothing. Returns what holds them, for as long as it lives."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that a kernel is replaced
        for name in PRODUCTS:
            original = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, _through_fp32(original), "CPU", with_keyset=True, allow_override=True)
    return library


def _through_fp32(original: Any) -> Callable[..., Tensor]:
    """original: the kernel, an object of torch's dispatcher that has no Python type; keys: what it dispatches on."""

    def multiply(keys: Any, *matrices: Tensor, **scales: float) -> Tensor:
        bf16 = matrices[0].dtype == torch.bfloat16
        product: Tensor = original.call_boxed(keys, *((m.float() for m in matrices) if bf16 else matrices), **scales)
        return product.bfloat16() if bf16 else product

    return multiply
