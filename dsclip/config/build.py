"""Sections and recipes from what was read; a value that doesn't fit is said in one sentence."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from dsclip.config.describe import allowed, element_type
from dsclip.config.objective_rules import objective_rules
from dsclip.config.schema import Recipe
from dsclip.config.synonyms import suggestion
from dsclip.errors import UserError, did_you_mean

Section = TypeVar("Section")
OUT_OF_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}


def build_recipe(tree: dict[str, Any], source: str) -> Recipe:
    """The recipe of {section: {key: value}}. Raises UserError for what no recipe has, or no run could use."""
    sections = typing.get_type_hints(Recipe)
    values = {}
    for name, keys in tree.items():
        if name not in sections:
            meant = suggestion(name, None, keys, tree)
            raise UserError(f"{source}: unknown section `{name}`.{meant} Known: {', '.join(sections)}")
        if keys is not None and not isinstance(keys, dict):
            raise UserError(f"{source}: `{name}` is a section; write its keys below it, indented")
        values[name] = _build_section(sections[name], name, keys or {}, source, tree)
    recipe = Recipe(**values)
    for holds, message in _between_keys(recipe):
        if not holds:
            raise UserError(f"{source}: {message}")
    return recipe


def _build_section(cls: type[Section], name: str, keys: dict[str, Any], source: str, tree: dict[str, Any]) -> Section:
    hints = typing.get_type_hints(cls, include_extras=True)
    for key, value in keys.items():
        if key not in hints:
            meant = suggestion(key, name, value, tree)
            raise UserError(f"{source}: unknown key `{name}.{key}`.{meant} Known: {', '.join(hints)}")
    try:
        return cls(**keys)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        raise UserError(f"{source}: {_sentence(found, name, hints, keys)}") from error


def _sentence(found: Sequence[Mapping[str, Any]], section: str, hints: dict[str, Any], keys: dict[str, Any]) -> str:
    """What is wrong with the first key that is, of pydantic's list."""
    path = found[0]["loc"]
    key = str(path[0])
    nested = allowed(hints[key]) if key in hints else None
    if nested and any(word.startswith("list[dict") for word in nested.types):  # Python's word for that helps nobody
        return f"`{section}.{key}` is {keys[key]!r}; give {nested.rule}"
    if path[2:] and isinstance(path[1], int) and isinstance(path[2], str):  # a key of an element that has keys
        inner = [{**error, "loc": error["loc"][2:]} for error in found if error["loc"][:2] == path[:2]]
        element = element_type(hints[key])
        keys_of = typing.get_type_hints(element, include_extras=True)
        return _sentence(inner, f"{section}.{key}[{path[1]}]", keys_of, keys[key][path[1]])
    if found[0]["type"] == "unexpected_keyword_argument":
        return f"unknown key `{section}.{key}`.{did_you_mean(key, list(hints))} Known: {', '.join(hints)}"
    if found[0]["type"] == "missing":
        return f"`{section}.{key}` is missing; it must be {allowed(hints[key]).type_words}"
    # Where a list is allowed and was given, the element that is wrong.
    elements = [loc[-1] for e in found if (loc := e["loc"])[0] == key and isinstance(loc[-1], int)]
    kind, name, value, what = found[0]["type"], f"{section}.{key}", keys[key], allowed(hints[key])
    if kind == "value_error":
        return f"`{name}` is {value!r}; give {what.rule}"
    if elements:
        listed = next(t for t in what.types if t.startswith("list["))
        return f"`{name}[{elements[0]}]` is {value[elements[0]]!r}; it must be {listed[len('list[') : -1]}"
    if kind == "literal_error" and isinstance(value, str):
        choices = list(what.choices)
        return f"`{name}` is `{value}`.{did_you_mean(value, choices)} Choose from: {', '.join(choices)}"
    if kind in OUT_OF_BOUNDS:
        return f"`{name}` is {value}; it must be {what.bounds or 'a finite number'}"
    return f"`{name}` is {value!r}; it must be {what.type_words}"


def _between_keys(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    """(whether it holds, a sentence for when it doesn't) of what no field can say alone."""
    batch, optim, train, loss = recipe.batch, recipe.optim, recipe.train, recipe.loss
    yield optim.min_lr <= optim.lr, f"`optim.min_lr` is {optim.min_lr}; it must be between 0 and optim.lr"
    yield (
        optim.warmup_steps <= train.steps,
        f"`optim.warmup_steps` is {optim.warmup_steps} and `train.steps` {train.steps}: the learning rate would never "
        "be reached. Lower the first or raise the second.",
    )
    yield (
        optim.momentum is None or optim.name == "muon",
        f"`optim.momentum` is {optim.momentum}; it belongs to `optim.name: muon`",
    )
    yield (
        optim.decay_share is None or optim.schedule == "wsd",
        f"`optim.decay_share` is {optim.decay_share}; it belongs to `optim.schedule: wsd`",
    )
    decay = optim.wsd_share * train.steps
    yield (
        optim.schedule != "wsd" or decay > 1,  # the step that begins it still has the whole learning rate
        f"`optim.schedule: wsd` would not fall: its decay is {decay:g} of {train.steps} steps and must be more than one. "
        "Raise `optim.decay_share` or `train.steps`, or use `constant`.",
    )
    yield (
        optim.schedule != "inverse_sqrt" or optim.warmup_steps > 0,
        "`optim.schedule: inverse_sqrt` begins to fall at the end of the warm-up and `optim.warmup_steps` is 0: step 100 would have a tenth "
        "of `optim.lr`. Give a warm-up.",
    )
    yield (
        optim.schedule != "constant" or optim.min_lr == 0,
        f"`optim.min_lr` is {optim.min_lr}, and `optim.schedule: constant` does not fall. Leave it out.",
    )
    decay_steps = round(decay) if optim.schedule == "wsd" else 0
    yield (
        optim.warmup_steps + decay_steps <= train.steps,
        f"`optim.warmup_steps` {optim.warmup_steps} and the decay of {decay_steps} steps exceed `train.steps` "
        f"{train.steps}. Lower `optim.warmup_steps` or `optim.decay_share`.",
    )
    yield (
        (loss.temperature == "scheduled") == (loss.final_temperature is not None),
        "`loss.final_temperature` belongs to `loss.temperature: scheduled`; set both or neither",
    )
    yield (
        loss.queue_momentum is None or loss.queue_size > 0,
        f"`loss.queue_momentum` is {loss.queue_momentum}; it needs `loss.queue_size` and must be in [0, 1)",
    )
    yield (
        recipe.data.classnames is None or recipe.data.templates is not None,
        "`data.classnames` are put into sentences; set `data.templates` too",
    )
    back = next((key for key in ("on_spike", "on_nonfinite") if getattr(train, key) == "rollback"), None)
    yield (
        back is None or recipe.data.order == "exact",
        f"`train.{back}: rollback` leaves out single batches, and with `data.order: {recipe.data.order}` these are no function of their number. "
        "Use data.order=exact, or leave it out.",
    )
    yield (
        back is None or train.keep_checkpoints > 1,
        f"`train.{back}: rollback` goes back to a checkpoint before the trouble began, which may be the last but one; set `train.keep_checkpoints` to 2 or more",
    )
    yield (
        train.on_spike != "rollback" or train.spike_window + 2 <= train.steps,
        f"`train.on_spike: rollback` follows two steps after the first `train.spike_window` ({train.spike_window}), and `train.steps` is {train.steps}; "
        "lower `train.spike_window`, or leave `train.on_spike` out",
    )
    yield (
        train.on_nonfinite == "stop" or train.max_nonfinite_steps is not None,
        "`train.on_nonfinite: rollback` follows so many steps in a row as `train.max_nonfinite_steps` says, which is null; give a number",
    )
    for key, listed in (("templates", recipe.data.templates), ("classnames", recipe.data.classnames)):
        yield listed != [], f"`data.{key}` is empty; name at least one, or leave it out"
    model = recipe.model
    yield (
        model.lock == "none" or loss.queue_momentum is None,
        f"`model.lock` is `{model.lock}` and `loss.queue_momentum` {loss.queue_momentum}: a locked tower has no moving average. "
        "Leave out the second; a queue goes without it.",
    )
    yield (
        model.lock != "none" or model.unlocked_layers == 0,
        f"`model.unlocked_layers` is {model.unlocked_layers}; it belongs to `model.lock: image` or `text`",
    )
    yield (
        not model.lock_once or (model.lock != "none" and model.unlocked_layers == 0),
        "`model.lock_once` keeps the features of a tower that never changes; set `model.lock` without `model.unlocked_layers`",
    )
    random = _random_pixels(recipe)
    yield (
        not model.lock_once or model.lock != "image" or random is None,
        f"`model.lock_once` with `model.lock: image` needs images that are the same in every epoch, and `{random}` draws them anew. Set "
        "data.crop_scale=[1.0,1.0] data.flip=false, leave out the others, or lock the text tower.",
    )
    lora = "model.lora_alpha" if model.lora_alpha is not None else "model.lora_full" if model.lora_full else None
    yield lora is None or model.lora_rank > 0, f"`{lora}` belongs to adapters; set `model.lora_rank` too"
    yield (
        not model.lora_rank or model.lock == "none",
        f"`model.lock` is `{model.lock}` and `model.lora_rank` {model.lora_rank}: adapters leave all weights locked. Leave out the first, "
        "and name the tower in `model.lora_targets`, such as [visual.blocks].",
    )
    yield (
        not model.lora_rank or bool(model.lora_targets),
        "`model.lora_targets` is empty; name layers that get an adapter, or leave it out",
    )
    yield (
        not model.lora_rank or loss.queue_momentum is None,
        f"`model.lora_rank` is {model.lora_rank} and `loss.queue_momentum` {loss.queue_momentum}: frozen weights have no moving average. "
        "Leave out the second; a queue goes without it.",
    )
    yield (
        loss.matryoshka_weights is None or len(loss.matryoshka_weights) == len(loss.matryoshka_dims),
        f"`loss.matryoshka_weights` has {len(loss.matryoshka_weights or [])} numbers; give one for each of the "
        f"{len(loss.matryoshka_dims)} in `loss.matryoshka_dims`",
    )
    yield from objective_rules(recipe)
    whole = batch.global_batch_size
    micro_batch = batch.micro_batch_size or whole
    yield micro_batch <= whole, f"`batch.micro_batch_size` {micro_batch} exceeds `batch.global_batch_size` {whole}"
    yield (
        (batch.chunk_size or 1) <= micro_batch,
        f"`batch.chunk_size` {batch.chunk_size} exceeds the micro-batch of {micro_batch}",
    )


def _random_pixels(recipe: Recipe) -> str | None:
    """A key by which an image differs from epoch to epoch; None where there is none. A crop of the whole area draws nothing."""
    data = recipe.data
    draws = {
        "data.crop_scale": data.crop_scale != [1.0, 1.0],
        "data.flip": data.flip,
        "data.color_jitter": data.color_jitter is not None,
        "data.grayscale": data.grayscale > 0,
        "model.patch_dropout": bool(recipe.model.patch_dropout),
        "objective.terms": any(name.startswith("image_") for name in recipe.objective.further_views),
    }
    return next((key for key, drawn in draws.items() if drawn), None)
