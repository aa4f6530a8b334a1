"""What of a model is trained: all of it, one tower (a lock), or adapters beside it and what is named; and the objective's heads."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import nn

from dsclip.config.objective_section import PAIRS_ALONE, ObjectiveSection
from dsclip.config.schema import ModelSection
from dsclip.errors import UserError
from dsclip.model.blocks import Linear
from dsclip.model.clip import Clip, Tower
from dsclip.model.config import ClipConfig
from dsclip.model.heads import add_heads
from dsclip.model.lock import lock_tower
from dsclip.model.low_rank import LowRank

WITHOUT_FORWARD = "pool.qkv"  # the attention pool cuts this layer's weight in two and multiplies itself


def choose_trained(model: Clip, section: ModelSection, objective: ObjectiveSection = PAIRS_ALONE) -> None:
    """Freezes what the section says, and adds its adapters and the objective's heads. Call it before the optimizer is built; under ZeRO-3 within
    `zero.Init`.

    Raises UserError for an expression that matches nothing, where nothing would be locked or frozen, and for a head that can't have its name.
    """
    if section.lora_rank:
        _adapt(model, section)
    else:
        lock_tower(model, section.lock, section.unlocked_layers)
    add_heads(model, objective)


def _adapt(model: Clip, section: ModelSection) -> None:
    whole = _found("model.lora_full", section.lora_full, [name for name, _ in model.named_parameters()])
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear) and WITHOUT_FORWARD not in name}
    if len(whole) == len(list(model.parameters())):
        raise UserError(
            "`model.lora_full` matches every parameter: nothing would be frozen. Leave out model.lora_rank to train everything"
        )
    adapted = _found("model.lora_targets", section.lora_targets, list(layers))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in whole)
    for name in adapted:
        layer = layers[name]
        if section.lora_rank > (least := min(layer.in_features, layer.out_features)):
            raise UserError(
                f"`model.lora_rank` is {section.lora_rank}, and {name} is a matrix of {layer.out_features} x {layer.in_features}: an adapter's "
                f"rank is at most {least}, and is of use far below"
            )
        layer.lora = LowRank(layer.in_features, layer.out_features, section.lora_rank, section.lora_scale)
    for tower in (model.visual, model.text):
        tower.locked = _leading_frozen(tower)


def _found(key: str, expressions: list[str], names: list[str]) -> list[str]:
    """The names in which one of the expressions is found. Raises UserError for one that is found in none."""
    for expression in expressions:
        if not any(re.search(expression, name) for name in names):
            raise UserError(
                f"`{key}`: `{expression}` is found in no name of this model. Names are such as {names[0]}, "
                f"{names[len(names) // 2]}, {names[-1]}."
            )
    return [name for name in names if any(re.search(expression, name) for expression in expressions)]


def _leading_frozen(tower: Tower) -> int:
    """Layers before the first of which something is trained: they need no graph."""
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in tower.layers()]
    return trained.index(True) if any(trained) else len(trained)


class TrainedPart(NamedTuple):
    """Sizes of what is trained. of: numbers of the model, adapters and heads included; parameters: numbers that have a gradient; beside: of these, the adapters' and heads', which the plain
    model doesn't have; locked: so many of the first layers of the image and the text tower run without a graph; shares: of what is in the
    others, the part that is trained; matrices: of `parameters`, those in matrices of blocks."""

    of: int
    parameters: int
    beside: int
    locked: tuple[int, int]
    shares: tuple[float, float]
    matrices: int

    def __str__(self) -> str:
        return f"{self.parameters:,} of {self.of:,} parameters are trained ({self.parameters / self.of:.2%})"


def trained_part(config: ClipConfig, section: ModelSection, objective: ObjectiveSection = PAIRS_ALONE) -> TrainedPart:
    """The sizes for a model of this configuration, which is built without memory. Raises UserError as `choose_trained`."""
    with torch.device("meta"):
        model = Clip(config)
        own = model.parameter_count()
        choose_trained(model, section, objective)
    towers = (model.visual, model.text)
    return TrainedPart(
        model.parameter_count(),
        sum(_trained(tower) for tower in towers),
        model.parameter_count() - own,
        (model.visual.locked, model.text.locked),
        (_trained_share(model.visual), _trained_share(model.text)),
        sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and is_block_matrix(n, p.shape)),
    )


def is_block_matrix(name: str, shape: torch.Size) -> bool:
    """Whether a parameter is a matrix of a block, which Muon makes orthogonal."""
    return ".blocks." in name and len(shape) == 2


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _trained_share(tower: Tower) -> float:
    with_graph = sum(p.numel() for layer in tower.layers()[tower.locked :] for p in layer.parameters())
    return _trained(tower) / with_graph if with_graph else 0.0
