"""Locked towers (LiT, Zhai et al. 2022): one tower keeps its weights, and the other learns to embed into its space."""

from __future__ import annotations

from dsclip.errors import UserError
from dsclip.model.clip import Clip


def lock_tower(model: Clip, name: str, unlocked_layers: int = 0) -> None:
    """Freezes a tower but for its last `unlocked_layers` layers: 1 is its head, 2 its head and its last block.

    name: `image`, `text` or `none`. What is frozen has no gradient and runs without a graph, so that nothing of it is kept
    for backward. Call it before the optimizer is built. Raises UserError when nothing would be frozen.
    """
    if name == "none":
        return
    tower = model.visual if name == "image" else model.text
    layers = tower.layers()
    if unlocked_layers >= len(layers):
        raise UserError(
            f"model.unlocked_layers is {unlocked_layers}, and the {name} tower has {len(layers)} layers (patches or tokens, "
            f"{len(tower.blocks)} blocks, head): nothing would be locked. Give less, or model.lock=none"
        )
    tower.locked = len(layers) - unlocked_layers
    for layer in layers[: tower.locked]:
        layer.requires_grad_(False)
