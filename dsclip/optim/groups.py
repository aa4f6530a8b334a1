"""Parameter groups: which parameters decay, and whose learning rate is scaled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from dsclip.config.objective_section import PAIRS_ALONE, ObjectiveSection
from dsclip.config.schema import ModelSection, OptimSection, Recipe
from dsclip.errors import UserError
from dsclip.model import Clip, ClipConfig
from dsclip.model.trained import choose_trained, is_block_matrix

GROUPING = ("name", "layer_decay", "rules", "weight_decay")  # the keys that divide parameters into groups
OF_A_GROUP = ("lr_scale", "weight_decay", "betas", "eps")
EMBEDDINGS = ("position_embedding", "class_embedding", "query_embedding", "registers")


class Group(NamedTuple):
    """What the parameters of a group have in common.

    free: vectors and embeddings, which don't decay unless a rule says so. orthogonal: the blocks' matrices, of Muon.
    """

    free: bool
    lr_scale: float
    weight_decay: float
    orthogonal: bool = False


def parameter_groups(model: Clip, optim: OptimSection) -> list[dict[str, Any]]:
    """Groups for torch's optimizers; `lr_scale` is the factor on the learning rate of the step. Raises UserError."""
    named = dict(model.named_parameters())
    return [
        {
            "params": [named[name] for name in names],
            **{key: getattr(group, key) for key in ("weight_decay", "lr_scale", "orthogonal")},
        }
        for group, names in grouped_names(model, optim).items()
    ]


def grouped_names(model: Clip, optim: OptimSection) -> dict[Group, list[str]]:
    """The names in each group, groups that decay by default first.

    Matrices decay; biases, norms and embeddings of positions, class, query and registers don't (OpenCLIP's rule). Then
    `optim.rules`, of which the last that matches and has the key counts, and layer-wise decay. Frozen ones are
    in no group. Raises UserError for a rule that matches no trained parameter, and where none is left to train.
    """
    groups: dict[Group, list[str]] = {}
    unused = {str(rule["match"]) for rule in optim.rules}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under zero.Init the tensor itself is empty
        free = len(shape) < 2 or name.endswith(EMBEDDINGS)
        values = {"lr_scale": 1.0, "weight_decay": 0.0 if free else optim.weight_decay}
        for rule in optim.rules:
            if re.search(str(rule["match"]), name):
                unused.discard(str(rule["match"]))
                values |= {key: float(value) for key, value in rule.items() if key != "match"}
        scale = values["lr_scale"] * optim.layer_decay ** layers_above(model, name)
        orthogonal = optim.name == "muon" and is_block_matrix(name, shape)
        groups.setdefault(Group(free, scale, values["weight_decay"], orthogonal), []).append(name)
    if unused:
        raise UserError(
            f"`optim.rules`: `{min(unused)}` matches no parameter of this model that is trained. Names are such as "
            "visual.blocks.0.attn.qkv.weight, text.embed.token_embedding, text.head.projection.weight."
        )
    if groups and not any(group.lr_scale for group in groups):
        raise UserError("`optim.rules`: `lr_scale` is 0 for all that would be trained; leave something to train")
    return dict(sorted(groups.items(), key=lambda item: item[0].free))


def layers_above(model: Clip, name: str) -> int:
    """Layers of its tower above a parameter's: 0 for the head, 1 for the last block, blocks + 1 for the embedding.

    The exponent of layer-wise decay (Bao et al. 2022, BEiT, whose code counts layers the same way).
    """
    tower, part, *rest = name.split(".")
    if part == "head":
        return 0
    depth = len(getattr(model, tower).blocks)
    return depth + 1 if part == "embed" else depth - int(rest[0])


def same_groups(config: ClipConfig, was: Mapping[str, Any], now: Recipe) -> bool:
    """Whether the optim section of an earlier run, as a manifest has it, divides what is trained as this recipe does."""
    before = OptimSection(**{key: value for key, value in was.items() if key in GROUPING})
    if all(getattr(before, key) == getattr(now.optim, key) for key in GROUPING):
        return True
    model = _outline(config, now.model, now.objective)
    return list(grouped_names(model, before).values()) == list(grouped_names(model, now.optim).values())


def check_rules(
    config: ClipConfig, section: ModelSection, optim: OptimSection, objective: ObjectiveSection = PAIRS_ALONE
) -> None:
    """Raises UserError as `grouped_names` and `choose_trained` do, before the model is built."""
    if optim.rules or section.lora_rank or section.lock != "none" or objective.heads:
        grouped_names(_outline(config, section, objective), optim)


def _outline(config: ClipConfig, section: ModelSection, objective: ObjectiveSection) -> Clip:
    """The model as it is trained, without memory: its names, its shapes, and what is frozen."""
    with torch.device("meta"):
        model = Clip(config)
        choose_trained(model, section, objective)
    return model


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """The learning rate of the next step, times each group's factor. optimizer: torch's or DeepSpeed's."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def group_settings(optimizer: Any) -> list[dict[str, Any]]:
    """What the recipe says of each group."""
    return [{key: group[key] for key in OF_A_GROUP} for group in optimizer.param_groups]


def restore_settings(optimizer: Any, settings: list[dict[str, Any]]) -> None:
    """Puts the recipe's settings back: DeepSpeed replaces them by the checkpoint's when it loads one."""
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
