"""Losses by name: the built-in ones, and those that users register."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from dsclip.errors import UserError, did_you_mean
from dsclip.losses.group import ALONE, Group
from dsclip.losses.info_nce import softmax
from dsclip.losses.late_interaction import filip
from dsclip.losses.pairs import PLAIN, Loss, LossGrads, Negatives, Pairs
from dsclip.losses.plugin import import_plugin
from dsclip.losses.siglip import sigmoid

L = TypeVar("L", bound=Loss)


@dataclass(frozen=True)
class RegisteredLoss:
    """A loss with what the engine must know of it. has_bias: it wants a learned logit bias. token_wise: all tokens.

    obeys: keys of the loss section, of those that not every loss can obey (`OPTIONAL`), that it obeys.
    """

    function: Loss
    has_bias: bool = False
    token_wise: bool = False
    obeys: frozenset[str] = frozenset()

    def __call__(
        self, pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries: int | None = None
    ) -> LossGrads:
        return self.function(pairs, negatives=negatives, group=group, tile_entries=tile_entries)


# Keys of the loss section that not every loss can obey, with the value that asks for nothing.
OPTIONAL: dict[str, object] = {"debiased": 0.0, "gather": "all"}

_LOSSES: dict[str, RegisteredLoss] = {
    "softmax": RegisteredLoss(softmax, obeys=frozenset({"debiased", "gather"})),
    "sigmoid": RegisteredLoss(sigmoid, has_bias=True, obeys=frozenset({"gather"})),
    "filip": RegisteredLoss(filip, token_wise=True, obeys=frozenset({"gather"})),
}


@overload
def register(
    name: str, loss: L, *, has_bias: bool = False, token_wise: bool = False, obeys: Collection[str] = ()
) -> L: ...
@overload
def register(
    name: str, loss: None = None, *, has_bias: bool = False, token_wise: bool = False, obeys: Collection[str] = ()
) -> Callable[[L], L]: ...
def register(
    name: str,
    loss: Loss | None = None,
    *,
    has_bias: bool = False,
    token_wise: bool = False,
    obeys: Collection[str] = (),
) -> Loss | Callable[[L], L]:
    """Makes a loss known under `name`, for `loss.name` of a recipe. Also a decorator; gives the loss back.

    loss(pairs, *, negatives, group, tile_entries) -> LossGrads. has_bias: it wants a learned logit bias. token_wise: it
    wants all tokens of both towers. obeys: those of the options in `OPTIONAL` that it obeys; the others are refused with it.
    Raises UserError for a name that is taken by another function, and for options that there are not.
    """
    if loss is None:
        return lambda function: register(name, function, has_bias=has_bias, token_wise=token_wise, obeys=obeys)
    if unknown := set(obeys) - OPTIONAL.keys():
        raise UserError(f"obeys: `{min(unknown)}` is none of: {', '.join(OPTIONAL)}")
    if name in _LOSSES and _LOSSES[name].function is not loss:
        raise UserError(f"a loss named `{name}` is registered already; choose another name")
    _LOSSES[name] = RegisteredLoss(loss, has_bias, token_wise, frozenset(obeys))
    return loss


def find_loss(name: str, plugin: str | None = None) -> RegisteredLoss:
    """The loss of that name, after importing `plugin` (a Python file or module that registers its own)."""
    if plugin is not None:
        import_plugin(plugin, "loss.plugin")
    if name not in _LOSSES:
        known = ", ".join(sorted(_LOSSES))
        raise UserError(
            f"loss.name `{name}` is not registered.{did_you_mean(name, list(_LOSSES))} Known: {known}. "
            "Your own: register it with dsclip.losses.register and name its file in loss.plugin"
        )
    return _LOSSES[name]


def checked(loss: Loss, pairs: Pairs, **options: Any) -> LossGrads:
    """Runs a loss and refuses what can't be its gradients, with a message that names the field."""
    result = loss(pairs, **options)
    if not isinstance(result, LossGrads):
        raise UserError(f"the loss returned {type(result).__name__}; it must return dsclip.losses.LossGrads")
    expected: dict[str, tuple[int, ...]] = {
        "loss": (),
        "d_log_scale": (),
        "d_image": tuple(pairs.image.shape),
        "d_text": tuple(pairs.text.shape),
    }
    if pairs.bias is not None:
        expected["d_bias"] = ()
    if pairs.hard_text is not None:
        expected["d_hard_text"] = tuple(pairs.hard_text.shape)
    for name, shape in expected.items():
        value = getattr(result, name)
        returned = None if value is None else tuple(value.shape)
        if returned != shape:
            raise UserError(
                f"the loss returned {name} of shape {returned}; it must have the shape {shape} of its feature"
            )
    return result
