"""Losses by name: the built-in ones, and those that users register."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dsclip.errors import UserError, did_you_mean
from dsclip.losses.cross_entropy import CrossEntropy
from dsclip.losses.group import Group, SingleRank
from dsclip.losses.pairs import LossGrads, Negatives, Pairs
from dsclip.losses.sides import widen
from dsclip.losses.sigmoid import Sigmoid
from dsclip.losses.similarity import Cosine, LateInteraction
from dsclip.losses.stage import contrast

Loss = Callable[..., LossGrads]
PLAIN, ALONE = Negatives(), SingleRank()


def softmax(
    pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries: int | None = None
) -> LossGrads:
    """InfoNCE, the CLIP loss −½·mean(log p_ii) − ½·mean(log q_ii) (Radford et al. 2021, figure 3).

    With G = (p + q − 2·Id)/(2N): dI = s·G·T, dT = s·Gᵀ·I, d log s = Σ G∘S. Raises nothing; see `Pairs` for shapes.
    """
    return contrast(
        pairs, similarity=Cosine, criterion=CrossEntropy, negatives=negatives, group=group, tile_entries=tile_entries
    )


def sigmoid(
    pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries: int | None = None
) -> LossGrads:
    """SigLIP (Zhai et al. 2023): −(1/N) Σ_ij log σ(z_ij(S_ij + b)), z = 1 for pairs and −1 otherwise. Needs a bias."""
    return contrast(
        pairs, similarity=Cosine, criterion=Sigmoid, negatives=negatives, group=group, tile_entries=tile_entries
    )


def filip(
    pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries: int | None = None
) -> LossGrads:
    """FILIP (Yao et al. 2022): InfoNCE over token-wise late interaction. Features are tokens [n, T, d]."""
    return contrast(
        pairs,
        similarity=LateInteraction,
        criterion=CrossEntropy,
        negatives=negatives,
        group=group,
        tile_entries=tile_entries,
    )


_LOSSES: dict[str, Loss] = {}


def register(name: str, loss: Loss | None = None, *, has_bias: bool = False, token_wise: bool = False):
    """Makes a loss known under `name`, for `loss.name` of a recipe. Also a decorator.

    loss(pairs, *, negatives, group, tile_entries) -> LossGrads. has_bias: it wants a learned logit bias. token_wise: it
    wants all tokens of both towers. Raises UserError for a name that is taken by another function.
    """
    if loss is None:
        return partial(register, name, has_bias=has_bias, token_wise=token_wise)
    if name in _LOSSES and _LOSSES[name] is not loss:
        raise UserError(f"a loss named `{name}` is registered already; choose another name")
    loss.has_bias, loss.token_wise = has_bias, token_wise
    _LOSSES[name] = loss
    return loss


register("softmax", softmax)
register("sigmoid", sigmoid, has_bias=True)
register("filip", filip, token_wise=True)


def find_loss(name: str, plugin: str | None = None) -> Loss:
    """The loss of that name, after importing `plugin` (a Python file or module that registers its own)."""
    if plugin is not None:
        _import(plugin)
    if name not in _LOSSES:
        known = ", ".join(sorted(_LOSSES))
        raise UserError(
            f"loss.name `{name}` is not registered.{did_you_mean(name, list(_LOSSES))} Known: {known}. "
            "Your own: register it with dsclip.losses.register and name its file in loss.plugin"
        )
    return _LOSSES[name]


def _import(plugin: str) -> None:
    if not plugin.endswith(".py"):
        try:
            importlib.import_module(plugin)
        except ModuleNotFoundError as error:
            raise UserError(f"loss.plugin: there is no module `{plugin}` ({error})") from error
        return
    path = Path(plugin)
    if not path.is_file():
        raise UserError(f"loss.plugin: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"dsclip_plugin_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


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


def checked(loss: Loss, pairs: Pairs, **options) -> LossGrads:
    """Runs a loss and refuses what can't be its gradients, with a message that names the field."""
    result = loss(pairs, **options)
    if not isinstance(result, LossGrads):
        raise UserError(f"the loss returned {type(result).__name__}; it must return dsclip.losses.LossGrads")
    expected = {"loss": (), "d_log_scale": (), "d_image": tuple(pairs.image.shape), "d_text": tuple(pairs.text.shape)}
    if pairs.bias is not None:
        expected["d_bias"] = ()
    if pairs.hard_text is not None:
        expected["d_hard_text"] = tuple(pairs.hard_text.shape)
    for name, shape in expected.items():
        value = getattr(result, name)
        found = None if value is None else tuple(value.shape)
        if found != shape:
            raise UserError(f"the loss returned {name} of shape {found}; it must have the shape {shape} of its feature")
    return result
