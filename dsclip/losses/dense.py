"""Losses from plain differentiable functions, for trying ideas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsclip.config.schema import LossSection
from dsclip.errors import UserError
from dsclip.losses.group import ALONE, Group
from dsclip.losses.pairs import PLAIN, LossGrads, Negatives, Pairs
from dsclip.losses.registry import OPTIONAL, RegisteredLoss
from dsclip.losses.samples import widen

DenseFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

# What the function isn't given, by its key in the loss section, with the value that asks for nothing.
NOT_GIVEN = {
    "duplicates": "negative", "label_smoothing": 0.0, "beta": 0.0, "filter_margin": None, "hard_negatives": "none",
    "queue_size": 0, "debiased": 0.0,
}  # fmt: skip


class DenseLoss:
    """A loss that `from_dense` made: autograd over the gathered features."""

    def __init__(self, function: DenseFunction):
        self.function = function

    def __call__(
        self, pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries: int | None = None
    ) -> LossGrads:
        _refuse(pairs, negatives, group)
        local = slice(group.rank * len(pairs.image), (group.rank + 1) * len(pairs.image))
        image_ND, text_ND = (widen(group.all_gather(x)).detach().requires_grad_() for x in (pairs.image, pairs.text))
        log_scale = pairs.log_scale.detach().requires_grad_()
        bias = None if pairs.bias is None else pairs.bias.detach().requires_grad_()
        with torch.enable_grad():
            value = self.function(image_ND, text_ND, log_scale, bias)
        inputs = [image_ND, text_ND, log_scale, *(() if bias is None else (bias,))]
        grads = torch.autograd.grad(value, inputs, materialize_grads=True)
        image_ND, text_ND = image_ND.detach(), text_ND.detach()
        image_similarity_nN = image_ND[local] @ text_ND.T
        text_similarity_nN = text_ND[local] @ image_ND.T
        partner_n = image_similarity_nN.diagonal(local.start)
        return LossGrads(
            loss=value.detach(),
            d_image=grads[0][local],
            d_text=grads[1][local],
            d_log_scale=grads[2],
            d_bias=grads[3] if len(grads) > 3 else None,
            correct_image=(partner_n >= image_similarity_nN.amax(1)).sum(),
            correct_text=(partner_n >= text_similarity_nN.amax(1)).sum(),
        )


def from_dense(loss: DenseFunction) -> DenseLoss:
    """A loss from a plain differentiable function, for trying ideas: autograd over the gathered features.

    loss(image [N, D], text [N, D], log_scale [], bias [] or None) -> scalar over the global batch. It holds whatever
    the function holds, N×N matrices too, on every rank. Raises UserError when it is asked for negatives, smoothing or
    tokens, which the function doesn't see.
    """
    return DenseLoss(loss)


def check_options(loss: RegisteredLoss, settings: LossSection) -> None:
    """Raises UserError for options of a recipe's loss section that the loss would not obey."""
    for key, nothing in OPTIONAL.items():
        if (value := getattr(settings, key)) != nothing and key not in loss.obeys:
            raise UserError(
                f"loss.{key}={value} can't be obeyed by the loss `{settings.name}`; set loss.{key}={nothing}, or take "
                "loss.name=softmax"
            )
    if not isinstance(loss.function, DenseLoss):
        return
    if loss.token_wise:
        raise UserError(f"the loss `{settings.name}` was made by from_dense and can't be token-wise; {_INSTEAD}")
    for key, nothing in NOT_GIVEN.items():
        if (value := getattr(settings, key)) != nothing:
            _refuse_option(f"loss.{key}={value}", f"loss.{key}={'null' if nothing is None else nothing}")


def _refuse(pairs: Pairs, negatives: Negatives, group: Group) -> None:
    if group.in_ring:
        _refuse_option("gather=ring", "gather=all")
    for name, nothing in NOT_GIVEN.items():
        if (value := vars(negatives).get(name, nothing)) != nothing:
            _refuse_option(f"{name}={value}", f"{name}={nothing}")
    for name, x in (("hard negatives", pairs.hard_text), ("a queue", pairs.queue_image)):
        if x is not None and len(x):
            _refuse_option(name, "none")
    if pairs.image.ndim != 2:
        raise UserError(f"a loss made by from_dense takes features [n, D], not tokens; {_INSTEAD}")


_INSTEAD = "write it as loss(pairs, *, negatives, group, tile_entries) -> LossGrads instead"


def _refuse_option(option: str, harmless: str) -> None:
    raise UserError(
        f"{option} can't be obeyed by a loss made by from_dense, whose function sees one batch of pairs and nothing else; "
        f"set {harmless}, or {_INSTEAD}"
    )
