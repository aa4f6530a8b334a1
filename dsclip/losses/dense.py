"""Losses from plain differentiable functions, for trying ideas."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsclip.losses.group import ALONE, Group
from dsclip.losses.pairs import PLAIN, LossGrads, Negatives, Pairs
from dsclip.losses.sides import widen

Loss = Callable[..., LossGrads]


def from_dense(loss: Callable) -> Loss:
    """A loss from a plain differentiable function, for trying ideas: autograd over the gathered features.

    loss(image [N, d], text [N, d], log_scale [], bias [] or None) -> scalar over the global batch. It holds whatever
    the function holds, N×N matrices too, on every rank.
    """

    def run(pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries=None):
        mine = slice(group.rank * len(pairs.image), (group.rank + 1) * len(pairs.image))
        gathered = [widen(group.all_gather(x)) for x in (pairs.image, pairs.text)]
        leaves = [x.detach().requires_grad_() for x in gathered]
        scalars = [None if x is None else x.detach().requires_grad_() for x in (pairs.log_scale, pairs.bias)]
        with torch.enable_grad():
            value = loss(*leaves, *scalars)
        inputs = [*leaves, *(x for x in scalars if x is not None)]
        grads = torch.autograd.grad(value, inputs, materialize_grads=True)
        similarity = leaves[0].detach()[mine] @ leaves[1].detach().T
        own = similarity.diagonal(mine.start)
        back = leaves[1].detach()[mine] @ leaves[0].detach().T
        return LossGrads(
            loss=value.detach(),
            d_image=grads[0][mine],
            d_text=grads[1][mine],
            d_log_scale=grads[2],
            d_bias=grads[3] if len(grads) > 3 else None,
            correct_image=(own >= similarity.amax(1)).sum(),
            correct_text=(own >= back.amax(1)).sum(),
        )

    return run
