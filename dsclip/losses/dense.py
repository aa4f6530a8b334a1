"""Losses from plain differentiable functions, for trying ideas."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsclip.errors import UserError
from dsclip.losses.group import ALONE, Group
from dsclip.losses.pairs import PLAIN, LossGrads, Negatives, Pairs
from dsclip.losses.sides import widen

Loss = Callable[..., LossGrads]

# What the function isn't given, by its key in the loss section, with the value that asks for nothing.
NOT_GIVEN = {
    "duplicates": "negative", "label_smoothing": 0.0, "beta": 0.0, "filter_margin": None, "hard_negatives": "none",
    "queue_size": 0,
}  # fmt: skip


def from_dense(loss: Callable) -> Loss:
    """A loss from a plain differentiable function, for trying ideas: autograd over the gathered features.

    loss(image [N, d], text [N, d], log_scale [], bias [] or None) -> scalar over the global batch. It holds whatever
    the function holds, N×N matrices too, on every rank. Raises UserError when it is asked for negatives, smoothing or
    tokens, which the function doesn't see.
    """

    def run(pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries=None):
        _refuse(pairs, negatives)
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

    run.from_dense = True
    return run


def check_options(loss: Loss, settings) -> None:
    """Raises UserError for options of a recipe's loss section that a loss made by `from_dense` would not obey."""
    if not getattr(loss, "from_dense", False):
        return
    if loss.token_wise:
        raise UserError(f"the loss `{settings.name}` was made by from_dense and can't be token-wise; {_INSTEAD}")
    for key, nothing in NOT_GIVEN.items():
        if (value := getattr(settings, key)) != nothing:
            _raise(f"loss.{key}={value}", f"loss.{key}={'null' if nothing is None else nothing}")


def _refuse(pairs: Pairs, negatives: Negatives) -> None:
    for name in ("duplicates", "label_smoothing", "beta", "filter_margin"):
        if (value := getattr(negatives, name)) != NOT_GIVEN[name]:
            _raise(f"{name}={value}", f"{name}={NOT_GIVEN[name]}")
    for name, x in (("hard negatives", pairs.hard_text), ("a queue", pairs.queue_image)):
        if x is not None and len(x):
            _raise(name, "none")
    if pairs.image.ndim != 2:
        raise UserError(f"a loss made by from_dense takes features [n, d], not tokens; {_INSTEAD}")


_INSTEAD = "write it as loss(pairs, *, negatives, group, tile_entries) -> LossGrads instead"


def _raise(found: str, harmless: str) -> None:
    raise UserError(
        f"{found} can't be obeyed by a loss made by from_dense, whose function sees one batch of pairs and nothing else; "
        f"set {harmless}, or {_INSTEAD}"
    )
