"""Reads recipes strictly: unknown keys, wrong types, duplicate keys and impossible values stop the run at once.

Later wins: the defaults of `schema.py`, then the recipe file, then `section.key=value` from the command line.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import asdict, fields
from importlib import resources
from pathlib import Path

import yaml

from dsclip.config.old_names import with_new_names
from dsclip.config.schema import Recipe
from dsclip.config.synonyms import suggestion
from dsclip.errors import UserError, did_you_mean

MAX_RECIPE_BYTES = 1 << 20
MAX_BATCH = 1 << 24  # a hundred times the largest published; beyond it even the features of a step fill machines
MAX_LAYERS = 1000  # beyond it a typing error; building such towers, even without memory, takes minutes


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML with `1e-3` as a number, `no` as a word, and neither duplicate keys nor aliases."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases are not allowed in recipes", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is no word", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key `{key}` stands here twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where 1e-3 is a string and no/on/yes are booleans; both surprise everyone.
_StrictLoader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|nan))$"),
    list("-+.0123456789"),
)


def load_recipe(name_or_path: str = "demo", overrides: list[str] = ()) -> Recipe:
    """A packaged recipe by name, or a YAML file, with overrides such as `optim.lr=1e-3`. Raises UserError."""
    source, text = _read(name_or_path)
    tree = parse_yaml(text, source) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{source} holds no sections; a recipe starts like `model:` or `data:`")
    tree = {k: with_new_names(k, v, source) if isinstance(v, dict) else v for k, v in tree.items()}
    for override in overrides:
        _apply(tree, override)
    recipe = _build(Recipe, tree, source, "", tree)
    check_values(recipe, source)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to the same recipe."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with dsclip."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("dsclip.recipes").iterdir() if p.name.endswith(".yaml")
    )


def parse_yaml(text: str, source: str):
    """Strict YAML; errors name the source and the line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{source}{line}: {error.problem or error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{source} is no valid YAML: {error}") from error


def _read(name_or_path: str) -> tuple[str, str]:
    if name_or_path in packaged_recipes():
        packaged = resources.files("dsclip.recipes") / f"{name_or_path}.yaml"
        return f"recipe {name_or_path}", packaged.read_text(encoding="utf-8")
    path = Path(name_or_path)
    if not path.is_file():
        known = packaged_recipes()
        raise UserError(
            f"--config {name_or_path}: neither a file nor a packaged recipe.{did_you_mean(name_or_path, known)} "
            f"Packaged: {', '.join(known)}"
        )
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes; a recipe has a few hundred")
    try:
        return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error})") from error


def _apply(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) != 2 or not all(parts):
        meant = suggestion(key, None, _plain(value), tree) if equals and len(parts) == 1 else ""
        raise UserError(f"`{override}` is no override; write section.key=value, such as optim.lr=1e-3.{meant}")
    section = tree.setdefault(parts[0], {})
    if section is None:
        section = tree[parts[0]] = {}
    if not isinstance(section, dict):
        raise UserError(f"`{override}`: `{parts[0]}` is no section")
    plain = parse_yaml(value, f"`{override}`") if value else ""
    section |= with_new_names(parts[0], {parts[1]: plain}, f"`{override}`")


def _plain(text: str):
    """The value of an override that is about to be refused; its text where it is no YAML."""
    try:
        return parse_yaml(text, "")
    except UserError:
        return text


def _build(cls, tree: dict, source: str, where: str, whole: dict):
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    values = {}
    for key, value in tree.items():
        name = f"{where}{key}"
        if key not in known:
            kind = "key" if where else "section"
            meant = suggestion(key, where.rstrip(".") or None, value, whole)
            raise UserError(f"{source}: unknown {kind} `{name}`.{meant} Known: {', '.join(known)}")
        if dataclasses.is_dataclass(hints[key]):
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{source}: `{name}` is a section; write its keys below it, indented")
            values[key] = _build(hints[key], value or {}, source, f"{name}.", whole)
        else:
            values[key] = _convert(value, hints[key], name, source)
    return cls(**values)


def _convert(value, hint, name: str, source: str):
    """`value` as the annotated type; integers are fine as floats, and nothing else changes its type."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is type(None):
            if value is None:
                return None
        elif typing.get_origin(option) is list:
            inner = typing.get_args(option)[0]
            if isinstance(value, list):
                return [_convert(v, inner, f"{name}[{i}]", source) for i, v in enumerate(value)]
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif option is int and isinstance(value, bool):
            continue
        elif isinstance(value, option):
            return value
    wanted = " or ".join(
        "null" if o is type(None) else str(o).replace("<class '", "").replace("'>", "") for o in options
    )
    raise UserError(f"{source}: `{name}` is {value!r}; it must be {wanted}")


def check_values(recipe: Recipe, source: str) -> None:
    """Raises UserError for values that no run could use."""
    batch, optim, train, loss = recipe.batch, recipe.optim, recipe.train, recipe.loss
    positive = {
        "batch.global_batch_size": batch.global_batch_size, "batch.micro_batch_size": batch.micro_batch_size,
        "batch.chunk_size": batch.chunk_size, "batch.memory_gb": batch.memory_gb, "train.steps": train.steps, "train.log_every": train.log_every,
        "train.save_every": train.save_every, "train.save_minutes": train.save_minutes, "train.keep_checkpoints": train.keep_checkpoints,
        "eval.every_steps": recipe.eval.every_steps, "eval.batch_size": recipe.eval.batch_size,
        "eval.max_samples": recipe.eval.max_samples, "data.shuffle_window": recipe.data.shuffle_window,
        "data.shuffle_unit": recipe.data.shuffle_unit, "data.streams": recipe.data.streams,
        "data.max_sample_bytes": recipe.data.max_sample_bytes,
        "data.max_image_pixels": recipe.data.max_image_pixels, "optim.lr": optim.lr, "optim.eps": optim.eps,
        "loss.init_temperature": loss.init_temperature, "loss.max_logit_scale": loss.max_logit_scale,
        "loss.final_temperature": loss.final_temperature,
    }  # fmt: skip
    for name, value in positive.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{source}: `{name}` is {value}; it must be greater than 0")
    choices = {
        "data.decoder": (recipe.data.decoder, ("fast", "exact")),
        "data.on_unreadable": (recipe.data.on_unreadable, ("stop", "skip")),
        "batch.accumulation": (batch.accumulation, ("auto", "manual")),
        "batch.checkpointing": (batch.checkpointing, ("auto", "none", "selective", "full", "offload")),
        "optim.schedule": (optim.schedule, ("cosine", "constant")),
        "train.compile": (train.compile, ("auto", "on", "off")),
        "loss.temperature": (loss.temperature, ("learned", "fixed", "scheduled")),
        "loss.hard_negatives": (loss.hard_negatives, ("none", "global", "own")),
        "loss.duplicates": (loss.duplicates, ("negative", "positive", "mask")),
        "loss.wire_dtype": (loss.wire_dtype, ("fp32", "bf16")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(
                f"{source}: `{name}` is `{value}`.{did_you_mean(value, list(allowed))} Choose from: {', '.join(allowed)}"
            )
    _check_ranges(recipe, source)


def _check_ranges(recipe: Recipe, source: str) -> None:
    batch, optim, data, train, loss = recipe.batch, recipe.optim, recipe.data, recipe.train, recipe.loss
    scale = data.crop_scale
    rules = [
        (0 <= optim.beta1 < 1 and 0 <= optim.beta2 < 1, "`optim.beta1` and `optim.beta2` must be in [0, 1)"),
        (optim.weight_decay >= 0, f"`optim.weight_decay` is {optim.weight_decay}; it must not be negative"),
        (0 <= optim.min_lr <= optim.lr, f"`optim.min_lr` is {optim.min_lr}; it must be between 0 and optim.lr"),
        (optim.warmup_steps >= 0, f"`optim.warmup_steps` is {optim.warmup_steps}; it must not be negative"),
        (
            optim.warmup_steps <= train.steps,
            f"`optim.warmup_steps` is {optim.warmup_steps} and `train.steps` {train.steps}: the learning rate would never "
            "be reached. Lower the first or raise the second.",
        ),
        (
            len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1,
            f"`data.crop_scale` is {scale}; give [low, high] within (0, 1]",
        ),
        (
            0 <= loss.label_smoothing < 1,
            f"`loss.label_smoothing` is {loss.label_smoothing}; it is a share: 0 ≤ share < 1",
        ),
        (loss.beta >= 0, f"`loss.beta` is {loss.beta}; it must not be negative"),
        (
            loss.queue_warmup_steps is None or loss.queue_warmup_steps >= 0,
            f"`loss.queue_warmup_steps` is {loss.queue_warmup_steps}; it must not be negative",
        ),
        (loss.queue_size >= 0, f"`loss.queue_size` is {loss.queue_size}; it must not be negative"),
        (
            (loss.temperature == "scheduled") == (loss.final_temperature is not None),
            "`loss.final_temperature` belongs to `loss.temperature: scheduled`; set both or neither",
        ),
        (
            loss.queue_momentum is None or (loss.queue_size and 0 <= loss.queue_momentum < 1),
            f"`loss.queue_momentum` is {loss.queue_momentum}; it needs `loss.queue_size` and must be in [0, 1)",
        ),
        (0 <= train.seed < 2**63, f"`train.seed` is {train.seed}; it must be between 0 and 2^63 - 1"),
        (
            batch.global_batch_size <= MAX_BATCH,
            f"`batch.global_batch_size` is {batch.global_batch_size}; dsclip takes batches of up to {MAX_BATCH} pairs",
        ),
        *(
            (
                not layers or layers <= MAX_LAYERS,
                f"`model.{name}` is {layers}; dsclip takes towers of up to {MAX_LAYERS}",
            )
            for name in ("vision_layers", "text_layers")
            for layers in [getattr(recipe.model, name)]
        ),
        (data.max_negatives > 0, f"`data.max_negatives` is {data.max_negatives}; it must be greater than 0"),
        (data.retries >= 0, f"`data.retries` is {data.retries}; it must not be negative"),
        (data.read_ahead_mb >= 0, f"`data.read_ahead_mb` is {data.read_ahead_mb}; it must not be negative"),
        (
            data.weights is None or (data.weights and min(data.weights) >= 0 and 0 < sum(data.weights) < math.inf),
            f"`data.weights` is {data.weights}; give numbers that are not negative, not all 0",
        ),
        (
            data.color_jitter is None
            or (
                len(data.color_jitter) == 4
                and min(data.color_jitter) >= 0
                and sum(data.color_jitter) < math.inf
                and data.color_jitter[3] <= 0.5
            ),
            f"`data.color_jitter` is {data.color_jitter}; give [brightness, contrast, saturation, hue], hue at most 0.5",
        ),
        (
            0 <= data.color_jitter_probability <= 1 and 0 <= data.grayscale <= 1,
            "`data.color_jitter_probability` and `data.grayscale` are shares of 1",
        ),
        (data.workers >= 0, f"`data.workers` is {data.workers}; it must not be negative"),
        (0 <= data.max_bad_fraction <= 1, f"`data.max_bad_fraction` is {data.max_bad_fraction}; it is a share of 1"),
        (
            re.fullmatch(r"[\w][\w.+-]*", train.name),
            f"`train.name` is {train.name!r}; use letters, digits and . _ - + only",
        ),
        (
            not batch.micro_batch_size or batch.micro_batch_size <= batch.global_batch_size,
            f"`batch.micro_batch_size` {batch.micro_batch_size} exceeds `batch.global_batch_size` {batch.global_batch_size}",
        ),
        (
            not batch.chunk_size or batch.chunk_size <= (batch.micro_batch_size or batch.global_batch_size),
            f"`batch.chunk_size` {batch.chunk_size} exceeds the micro-batch of "
            f"{batch.micro_batch_size or batch.global_batch_size}",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise UserError(f"{source}: {message}")
