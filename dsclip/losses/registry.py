"""Losses by name: the built-in ones, and those that users register."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import partial
from pathlib import Path

from dsclip.errors import UserError, did_you_mean
from dsclip.losses.builtin import filip, sigmoid, softmax
from dsclip.losses.dense import Loss
from dsclip.losses.pairs import LossGrads, Pairs

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
    name = f"dsclip_plugin_{path.resolve()}"
    if name in sys.modules:  # its losses are registered
        return
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"loss.plugin {path} could not be imported: {type(error).__name__}: {error}") from error


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
