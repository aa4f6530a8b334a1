"""The matrix products of tiles: plain, or on a GPU's tensor cores with less error than features rounded to bf16 have.

    plain   what torch does with the operands' dtype: on a GPU float32 without tensor cores
    tf32    both operands rounded to 11 significant bits:             an entry errs by at most 2⁻¹⁰·Σ|x·y|
    split   x = high + low, both bf16: high·high + high·low + low·high, 2⁻¹⁵·Σ|x·y|

and all by what the float32 sum rounds. Features rounded to bf16 err by up to 2⁻⁷·Σ|x·y|, as those of towers in bf16 do anyway:
8 times as much as tf32 and 256 times as much as split. For unit rows Σ|x·y| is at most 1, and a logit errs by s times that.
float64 is never rounded. Features that travelled in bf16 have no low part, and their products with others are two instead of three.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dsclip.losses.fused import split

Precision = Literal["plain", "tf32", "split"]


class Split(NamedTuple):
    """high + low [r, c], both bf16; low None: nothing."""

    high: Tensor
    low: Tensor | None

    @property
    def T(self) -> Split:
        """Transposed."""
        return Split(self.high.T, None if self.low is None else self.low.T)


Operand = Tensor | Split


class Products:
    """Products in one precision; None: the best that the device is fast with. An operand is made once and used often.

    On a CPU tf32 is plain, and split is what a GPU would compute, for tests.
    """

    def __init__(self, precision: Precision | None = None):
        self._precision = precision

    def operand(self, x: Tensor, *, is_bf16: bool = False) -> Operand:
        """A matrix [r, c] as the products take it. is_bf16: its numbers are bf16's, so that there is no low part."""
        if x.dtype != torch.float32 or (self._precision or best_precision(x.device)) != "split":
            return x
        return Split(x.bfloat16(), None) if is_bf16 else Split(*split(x))

    def multiply(self, x: Operand, y: Operand, out: Tensor | None = None) -> Tensor:
        """x·y, [r, k] times [k, c], into `out` where it is given."""
        if isinstance(x, Split) and isinstance(y, Split):
            return _multiply_split(x, y, out)
        if isinstance(x, Split) or isinstance(y, Split):
            raise ValueError("one operand is split and the other isn't")
        with self._tensor_cores(x):
            return torch.mm(x, y, out=out)

    def add(self, total: Tensor, x: Operand, y: Operand) -> None:
        """Adds x·y to the total [r, c]."""
        if isinstance(x, Split) or isinstance(y, Split):
            total += self.multiply(x, y)
            return
        with self._tensor_cores(x):
            total.addmm_(x, y)

    @contextmanager
    def _tensor_cores(self, like: Tensor) -> Iterator[None]:
        if self._precision != "tf32" or not like.is_cuda:
            yield
            return
        was = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = was


@cache
def best_precision(device: torch.device) -> Precision:
    """`split` on GPUs that multiply bf16 (compute capability 8.0 and later); elsewhere `plain`."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "split" if fast else "plain"


def _multiply_split(x: Split, y: Split, out: Tensor | None) -> Tensor:
    rows, inner, cols = *x.high.shape, y.high.shape[1]
    terms = [(x.high, y.high)]
    terms += [] if y.low is None else [(x.high, y.low)]
    terms += [] if x.low is None else [(x.low, y.high)]
    if inner <= min(rows, cols):  # a large result of short sums: one product of longer sums writes it once
        lefts, rights = zip(*terms, strict=True)
        return _wide(torch.cat(lefts, 1), torch.cat(rights, 0), out)
    result = _wide(*terms[0], out)
    for left, right in terms[1:]:
        result += _wide(left, right)
    return result


def _wide(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x·y of bf16 matrices in float32. Their products are exact in float32, so on a CPU this is the same up to the sum's order."""
    if not x.is_cuda:
        return torch.mm(x.float(), y.float(), out=out)
    if out is None:
        return torch.mm(x, y, out_dtype=torch.float32)
    return torch.mm(x, y, out_dtype=torch.float32, out=out)
