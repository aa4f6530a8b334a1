"""Patch dropout (FLIP, Li et al. 2023): train on a random part of each image's patches.

The patches that stay visible are a function of (seed, step, sample id) alone. A second forward of the same sample, on any rank, in
any chunk, under recomputation or compilation, therefore sees the same mask; no generator state is involved.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _to_signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _to_signed(0x9E3779B97F4A7C15)
_MIX_1 = _to_signed(0xBF58476D1CE4E5B9)
_MIX_2 = _to_signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # int64 shifts copy the sign bit; the mask makes the shift logical.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """SplitMix64 (Steele et al. 2014) of int64 values, wrapping around; the same on every device."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def view_ids(sample_ids: Tensor, number: int) -> Tensor:
    """Ids [n] for view `number` of each sample, whose masks are then its own; those of the samples for the first."""
    return sample_ids if number == 1 else splitmix64(splitmix64(sample_ids) + number)


def visible_patches(sample_ids: Tensor, patches: int, share: float, *, seed: int, step: int) -> Tensor:
    """Indices of the patches that each sample shows to the tower, ascending.

    sample_ids [n] int64; `share` of the patches is dropped, at least one stays. Returns [n, K] int64.
    """
    visible = max(1, int(patches * (1 - share)))
    key = splitmix64(splitmix64(torch.full((1,), seed, dtype=torch.int64, device=sample_ids.device)) + step)
    per_sample = splitmix64(sample_ids + key)
    scores = splitmix64(per_sample[:, None] + torch.arange(patches, device=sample_ids.device))
    return scores.topk(visible, dim=1).indices.sort(dim=1).values
