"""Whether a run can go on from a checkpoint: told from its manifest and the run's settings, before anything is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dsclip.checkpoint.manifest import Manifest
from dsclip.checkpoint.weights_alone import check_continuable
from dsclip.config.schema import OF_WHAT_IS_TRAINED, ModelSection, Recipe
from dsclip.engine.state import LAYOUTS, Sharding
from dsclip.errors import UserError
from dsclip.losses import find_loss
from dsclip.model.config import OF_THE_RUN, ClipConfig
from dsclip.optim.groups import same_groups


def check_fits(
    manifest: Manifest,
    path: Path,
    *,
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    config: ClipConfig,
    world_size: int,
) -> None:
    """Raises UserError that names what is another one in the checkpoint and must not be: model, what is trained, optimizer, groups,
    loss; ranks and ZeRO stage where the checkpoint or the order of the data can't follow."""
    check_continuable(manifest, path)
    afresh = f"or start a new run from its weights with model.init={path}."
    was = Sharding(manifest["world_size"], manifest["zero_stage"])
    now = Sharding(world_size, ds_config["zero_optimization"]["stage"])
    if was != now and not any(fnmatch(name, LAYOUTS) for name in manifest["files"]):
        raise UserError(
            f"{path} was written by {was} and this run has {now}: its version of dsclip didn't write where the optimizer's numbers lie. "
            f"Use the same again, {afresh}"
        )
    if was.ranks != now.ranks and recipe.data.order != "exact":
        raise UserError(
            f"{path} was written by {was} and this run has {now}: with data.order={recipe.data.order} a position in the data belongs to a "
            f"number of ranks. Use as many again, {afresh}"
        )
    ours = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    # An earlier version wrote fewer fields.
    theirs = {f.name: f.default for f in fields(ClipConfig)} | manifest["model"]
    if different := [k for k in ours if k not in OF_THE_RUN and ours[k] != theirs[k]]:
        raise UserError(
            f"{path} holds another model: {', '.join(different)} differ. Resume with the recipe of that run."
        )
    section, then = recipe.model, manifest["recipe"].get("model", {})
    defaults = ModelSection()  # an earlier version wrote fewer keys
    trained_then = {name: then.get(name, getattr(defaults, name)) for name in OF_WHAT_IS_TRAINED}
    if different := [name for name, value in trained_then.items() if value != getattr(section, name)]:
        settings = " ".join(f"model.{name}={_written(trained_then[name])}" for name in different)
        raise UserError(
            f"{path} was trained with {settings}, to which its weights and the optimizer's state belong. Resume with that, {afresh}"
        )
    heads_then = manifest["recipe"].get("objective", {}).get("heads", [])  # an earlier version had none
    if heads_then != (heads := [asdict(head) for head in recipe.objective.heads]):
        raise UserError(
            f"{path} was trained with the heads {json.dumps(heads_then)} and this run has {json.dumps(heads)}; the optimizer's state belongs to "
            f"them. Resume with objective.heads of that run, {afresh}"
        )
    optim = manifest["recipe"].get("optim", {})
    if (name := optim.get("name", "adamw")) != recipe.optim.name:  # an earlier version had no other
        raise UserError(
            f"{path} was trained with optim.name {name}, and {recipe.optim.name} has another state. Resume with that of the run, {afresh}"
        )
    if not same_groups(config, optim, recipe):
        raise UserError(
            f"{path} holds other parameter groups: optim.layer_decay, rules and weight_decay divide the parameters in another way. "
            f"Resume with those of that run, {afresh}"
        )
    had, needed = set(manifest["engine"].get("scalars", ())), {"log_scale"}
    if find_loss(recipe.loss.name, recipe.loss.plugin).has_bias:
        needed.add("bias")
    if had != needed:
        loss = manifest["recipe"].get("loss", {}).get("name", "another loss")
        raise UserError(
            f"{path} was trained with {loss}, which learns {_words(had)}, and loss.name {recipe.loss.name} learns {_words(needed)}. "
            f"Resume with the loss of that run, {afresh}"
        )
    queued = manifest["recipe"].get("loss", {}).get("queue_size", 0)
    if queued and recipe.loss.queue_size not in (0, queued):
        raise UserError(
            f"{path} holds a queue of {queued} pairs and loss.queue_size is {recipe.loss.queue_size}; resume with the same size"
        )


def _written(value: Any) -> str:
    """As an override gives it, also in a shell."""
    if isinstance(value, str):
        return value
    return f"'{json.dumps(value)}'" if isinstance(value, list) else json.dumps(value)


def _words(scalars: set[str]) -> str:
    return " and ".join(
        {"log_scale": "a temperature", "bias": "a bias"}.get(s, s) for s in sorted(scalars, reverse=True)
    )
