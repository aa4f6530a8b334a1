"""The arithmetic of InfoNCE's tiles as fused kernels: each tile is read once and written once.

Plain operations pass over a tile eleven times, which a CPU's caches hide and a GPU's memory does not. The functions are
the reference written in one expression, compiled by torch; the plain path in `cross_entropy` is what they are tested
against. They are used on CUDA, and no more in a process in which they could not be compiled; out of memory stays an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
_state = {"usable": True}


def use_fused(like: Tensor) -> bool:
    """Whether tiles on this tensor's device go through the fused functions."""
    return like.is_cuda and _state["usable"]


def log_sum_exp(logits: Tensor, excluded: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """(the largest logit, the log-sum-exp without the excluded entries) along dim of a tile [r, c]."""
    return _run(_log_sum_exp, logits, excluded, dim)


def pair_weights(
    logits: Tensor, row_lse: Tensor, col_lse: Tensor, rows_out: Tensor | None, cols_out: Tensor | None
) -> Tensor:
    """exp(S − row_lse) + exp(S − col_lse), [r, c], without the entries that rows_out and cols_out [r, c] exclude."""
    return _run(_pair_weights, logits, row_lse, col_lse, rows_out, cols_out)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x float32 as (high, low), both bf16: high + low is x up to 2⁻¹⁷·|x|."""
    return _run(_split, x) if use_fused(x) else _split(x)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    # Rounded by hand: compiled code computes bf16 in float32, so that x − x.bfloat16() would be 0 there.
    high = ((x.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
    return high.bfloat16(), (x - high).bfloat16()


def _log_sum_exp(logits: Tensor, excluded: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    best = logits.amax(dim)
    seen, top = logits, best
    if excluded is not None:
        seen = logits.masked_fill(excluded, -torch.inf)
        top = seen.amax(dim).clamp_min(torch.finfo(logits.dtype).min)  # nothing may be left of a row in this tile
    return best, (seen - top.unsqueeze(dim)).exp().sum(dim).log() + top


def _pair_weights(
    logits: Tensor, row_lse: Tensor, col_lse: Tensor, rows_out: Tensor | None, cols_out: Tensor | None
) -> Tensor:
    row = (logits - row_lse[:, None]).exp()
    col = (logits - col_lse[None, :]).exp()
    if rows_out is not None:
        row = row.masked_fill(rows_out, 0)
    if cols_out is not None:
        col = col.masked_fill(cols_out, 0)
    return row + col


@cache
def _compiled(function: Callable[P, T]) -> Callable[P, T]:
    return torch.compile(function, dynamic=True)


def _run(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    if _state["usable"]:
        try:
            result: T = _compiled(function)(*arguments, **options)
            return result
        except Exception as error:  # no compiler on this machine: the same numbers, more slowly
            if _out_of_memory(error):  # the plain functions need more of it
                raise
            _state["usable"] = False
            warnings.warn(
                f"the loss runs unfused: torch.compile failed ({type(error).__name__}: {error})", stacklevel=2
            )
    return function(*arguments, **options)


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that it was raised from, says that memory ran out."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        error = error.__cause__ or error.__context__
    return False
