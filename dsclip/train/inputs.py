"""What a run is started with: read and checked on every rank alike, before anything is built or written."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsclip.checkpoint import check_fits, read_manifest
from dsclip.config import Recipe, load_ds_config, load_recipe
from dsclip.convert.hf import hf_class
from dsclip.convert.init import starting_config, starting_tokenizer
from dsclip.data import build_loader, load_tokenizer, resolve_shards
from dsclip.data.decoding.tokenizer import Tokenizer
from dsclip.data.layouts.recognise import recognise
from dsclip.data.loader import Loader
from dsclip.data.ordered_sets import check_order, data_sets
from dsclip.data.sources.storage import Storage
from dsclip.distributed import Collectives, launched_ranks
from dsclip.errors import UserError
from dsclip.evaluate import IN_TRAINING
from dsclip.losses import check_options, find_loss
from dsclip.model import ClipConfig
from dsclip.model.config import OF_THE_RUN
from dsclip.model.fp8 import check_fp8_shapes
from dsclip.model.presets import AUTO
from dsclip.model.trained import TrainedPart, trained_part
from dsclip.objectives import build_objective
from dsclip.optim.groups import check_rules
from dsclip.train.class_prompts import with_class_prompts
from dsclip.train.evaluation import Evaluation
from dsclip.train.resume import check_length
from dsclip.train.run_folder import find_resume
from dsclip.train.teacher import Taught, find_teacher


@dataclass(frozen=True)
class RunInputs:
    """Everything that was checked before the first collective."""

    recipe: Recipe
    ds_config: dict[str, Any]
    model: ClipConfig
    trained: TrainedPart
    """What of it is trained."""
    taught: Taught | None
    """By whom it is, where the objective has a teacher."""
    tokenizer: Tokenizer
    run_dir: Path
    resume: Path | None
    """The checkpoint to continue from."""
    init: str | None
    """The weights to start from."""
    evaluation: Evaluation
    """Its sets are open and checked."""


def read_inputs(arguments: argparse.Namespace) -> RunInputs:
    """Raises UserError, on every rank alike, for what can't work."""
    recipe = load_recipe(arguments.config, arguments.overrides)
    check_options(find_loss(recipe.loss.name, recipe.loss.plugin), recipe.loss)
    world_size = launched_ranks()[1]
    ds_config = load_ds_config(arguments.ds_config, recipe, world_size)
    storage = Storage(tuple(recipe.data.trusted_hosts), recipe.data.retries)
    for key, shards in _named_shards(recipe):
        try:
            recognise(shards, storage) if key.startswith("eval.") else resolve_shards(shards, storage)
        except UserError as error:
            raise UserError(f"`{key}`: {error}") from error
    recipe = replace(recipe, data=with_class_prompts(recipe.data, storage))
    check_order(recipe.data, recipe.batch.global_batch_size, world_size, storage)
    run_dir = Path(recipe.train.output) / recipe.train.name
    resume = find_resume(arguments.resume, run_dir)
    manifest = read_manifest(resume) if resume else None
    if resume and manifest:
        check_length(manifest, resume, recipe.train.steps)
    # A resumed run goes on with the model of its checkpoint, whether the weights it began with are still there or not.
    source = resume or recipe.model.init
    if source is None and (recipe.model.lock != "none" or recipe.model.lora_rank):
        key = "lora_rank" if recipe.model.lora_rank else "lock"
        raise UserError(
            f"`model.{key}` is {getattr(recipe.model, key)} without `model.init`: what it locks would stay random. Say where the weights are."
        )
    tokenizer = load_tokenizer(starting_tokenizer(source, recipe.data.tokenizer))
    model = starting_config(
        source,
        recipe.model.preset,
        tokens=tokenizer.vocab_size,
        eot_token_id=tokenizer.eot_token_id,
        **recipe.model.overrides,
    )
    if recipe.model.init and recipe.model.preset == AUTO:  # written down: a model of that name may be another one later
        recipe = replace(recipe, model=replace(recipe.model, **_of_the_weights(model, recipe)))
    taught = find_teacher(recipe, model, storage)
    recipe = recipe if taught is None else taught.temperate(recipe)
    build_objective(recipe, model.embed_dim)
    check_fp8_shapes(model)
    check_rules(model, recipe.model, recipe.optim, recipe.objective)
    trained = trained_part(model, recipe.model, recipe.objective)
    if resume and manifest:
        check_fits(manifest, resume, recipe=recipe, ds_config=ds_config, config=model, world_size=world_size)
    if recipe.train.export_hf:  # now, not after the training
        try:
            hf_class(model)
        except UserError as error:
            raise UserError(f"{error}. Set train.export_hf=false to train it all the same") from error
    init = None if resume else recipe.model.init
    evaluation = Evaluation(recipe, model, tokenizer)
    return RunInputs(recipe, ds_config, model, trained, taught, tokenizer, run_dir, resume, init, evaluation)


def make_loader(inputs: RunInputs, group: Collectives, state: dict[str, Any] | None) -> Loader:
    """This rank's endless loader, at the position of `state`."""
    recipe = inputs.recipe
    return build_loader(
        recipe.data,
        tokenizer=inputs.tokenizer,
        image_size=inputs.model.image_size,
        context_length=inputs.model.context_length,
        global_batch_size=recipe.batch.global_batch_size,
        seed=recipe.train.seed,
        rank=group.rank,
        world_size=group.world_size,
        hard_negatives=recipe.loss.hard_negatives != "none",
        views=recipe.objective.view_settings,
        classes=recipe.objective.classes,
        taught_passes=None if inputs.taught is None else inputs.taught.passes,
        state=state,
    )


def _of_the_weights(model: ClipConfig, recipe: Recipe) -> dict[str, Any]:
    """The keys of the recipe that say what model the weights fit, with their values."""
    values = {name: getattr(model, name) for name in recipe.model.overrides if name not in OF_THE_RUN}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _named_shards(recipe: Recipe) -> list[tuple[str, str | list[str]]]:
    """(key of the recipe, shards) of the training data and of every evaluation that is on."""
    training = [("data.train_shards", shards) for shards in data_sets(recipe.data)]
    evaluated = [(f"{task}_shards", getattr(recipe.eval, f"{task}_shards")) for task in IN_TRAINING]
    return training + [(f"eval.{key}", shards) for key, shards in evaluated if shards]
