"""Weights to start from, fitted to the model that is to be trained."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsclip.convert.positions import resize_positions, resize_text_positions
from dsclip.convert.source import OWN_CHOICE, TAKEN, Source, describe_source, open_source
from dsclip.convert.upcycle import upcycled
from dsclip.distributed import Collectives
from dsclip.errors import UserError
from dsclip.model import Clip, ClipConfig, resolve_preset
from dsclip.model.config import OF_EXPERTS
from dsclip.model.presets import AUTO

IMAGE_POSITIONS = "visual.embed.position_embedding"
TEXT_POSITIONS = "text.embed.position_embedding"


def starting_config(path: str | Path | None, preset: str, *, tokens: int = 0, **overrides: Any) -> ClipConfig:
    """The model to start with: the preset with its overrides, and what the source of its weights says of it.

    preset `auto`: the source's own model, all of it. Another one: from the source comes what shapes of weights don't show, so
    that its activation, heads, norms, colours and end token are not forgotten. An override that is given keeps its value; where
    it contradicts the source, `load_init` refuses. path: None for a model without a source. tokens: those of the tokenizer; the
    vocabulary has at least as many, and the source's may have more. Raises UserError.
    """
    said = {} if path is None else describe_source(path).said
    if tokens:
        overrides["vocab_size"] = max(tokens, said.get("vocab_size", 0))
    given = {name for name, value in overrides.items() if value is not None}
    if resolve_preset(preset).activation == "quick_gelu":
        given.add("activation")  # its name or its file says so
    if preset == AUTO and path is not None and not said:
        raise UserError(
            f"{path} has no configuration beside it that says what its model is; set model.preset to the one with its shapes"
        )
    names = said if preset == AUTO else TAKEN
    taken = {name: said[name] for name in names if name in said and name not in given}
    return resolve_preset(preset, **overrides | taken)


def starting_tokenizer(path: str | Path | None, name: str) -> str:
    """The tokenizer to start with: of that name, or with `auto` the source's, or the demo's without one. Raises UserError."""
    if name != AUTO:
        return name
    if path is None:
        return "demo"
    folder = describe_source(path).tokenizer_dir
    if folder is None:
        raise UserError(f"{path} has no tokenizer with it; set data.tokenizer to the one that it was made for")
    return str(folder)


def load_init(path: str | Path, config: ClipConfig, stretch: str = "linear") -> tuple[dict[str, Tensor], float]:
    """(float32 weights that fit `config`, logit scale as a factor), as `fitted_weights`."""
    return fitted_weights(open_source(path), config, stretch)


def fitted_weights(source: Source, config: ClipConfig, stretch: str = "linear") -> tuple[dict[str, Tensor], float]:
    """(float32 weights that fit `config`, logit scale as a factor).

    Position embeddings are resized where the image size or the context length differs; stretch: how a longer context gets
    its own, see `resize_text_positions`. A dense source's MLPs become experts where `config` has such. Raises UserError that
    names what doesn't fit.
    """
    _check_said(source, config)
    weights = {name: tensor.float() for name, tensor in source.weights()}
    if IMAGE_POSITIONS in weights:
        weights[IMAGE_POSITIONS] = resize_positions(weights[IMAGE_POSITIONS], config.patches, config.class_tokens)
    if TEXT_POSITIONS in weights:
        weights[TEXT_POSITIONS] = resize_text_positions(weights[TEXT_POSITIONS], config.context_length, stretch)
    weights = upcycled(weights, config)
    _check_fit(weights, config, source.path)
    return weights, source.scale


def _check_said(source: Source, config: ClipConfig) -> None:
    """Raises UserError that names the fields in which the source and the configuration contradict each other."""
    said = (source.shown or {}) | source.said
    becomes_routed = config.text_experts > 0 and not said.get("text_experts")
    own_choice = (*OWN_CHOICE, *(OF_EXPERTS if becomes_routed else ()))
    contradictions = {
        name: (value, getattr(config, name))
        for name, value in said.items()
        if name not in own_choice and _compared(name, value) != _compared(name, getattr(config, name))
    }
    if contradictions:
        differences = ", ".join(
            f"{name} {_listed(theirs)} against {_listed(ours)}" for name, (theirs, ours) in contradictions.items()
        )
        settings = " ".join(
            f"model.{name}={_listed(theirs)}" for name, (theirs, _) in contradictions.items() if name in TAKEN
        )
        advice = (
            "Set model.preset=auto data.tokenizer=auto to start with that model, or choose what matches it"
            if not settings
            else f"Leave out what says otherwise, or set {settings}"
        )
        raise UserError(f"model.init={source.path} is another model than this one: {differences}. {advice}.")


def _compared(name: str, value: object) -> object:
    """What must be equal; of a layer scale that there is one, as its beginning is behind the weights."""
    return value is not None if name.endswith("layer_scale") else _listed(value)


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class InitialWeights:
    """What a run starts from. weights: None on all ranks but 0. bias: a sigmoid loss's, if there was one. notes: what was taken for granted, in sentences."""

    weights: dict[str, Tensor] | None
    scale: float
    bias: float | None
    notes: list[str]


def scale_notes(source: Source, max_logit_scale: float) -> list[str]:
    """A sentence when a run can't begin with the source's logit scale, which is clamped to 1 and `max_logit_scale`."""
    begins = min(max(source.scale, 1.0), max_logit_scale)
    if math.isclose(begins, source.scale, rel_tol=1e-6):  # its logarithm is stored in float32
        return []
    keeps = f"; set loss.max_logit_scale={math.ceil(source.scale)} to keep it" * (source.scale > begins)
    return [f"{source.path} has the logit scale {source.scale:.6g}, and the run begins with {begins:.6g}{keeps}"]


def load_init_once(
    path: str | Path,
    config: ClipConfig,
    group: Collectives,
    stretch: str = "linear",
    max_logit_scale: float = math.inf,
) -> InitialWeights:
    """What `load_init` returns, read by rank 0 alone. Collective.

    max_logit_scale: to which the run clamps, so that the notes say when that changes the source's scale. What rank 0 finds wrong is a UserError on every rank.
    """
    weights: dict[str, Tensor] | None = None
    problem: str | None = None
    scale, bias, notes = 1.0, None, list[str]()  # rank 0's count
    if group.rank == 0:
        try:
            source = open_source(path)
            weights, scale = fitted_weights(source, config, stretch)
            bias, notes = source.logit_bias, source.notes(config) + scale_notes(source, max_logit_scale)
        except UserError as error:
            problem = str(error)
        except Exception as error:  # a damaged file raises what its reader likes, and the other ranks wait
            problem = f"model.init={path} could not be read ({type(error).__name__}: {error}); it may be damaged"
    scale, bias, notes, problem = group.broadcast_object((scale, bias, notes, problem))
    if problem:
        raise UserError(problem)
    return InitialWeights(weights, scale, bias, notes)


def _check_fit(weights: dict[str, Tensor], config: ClipConfig, path: Path) -> None:
    with torch.device("meta"):
        expected = {name: p.shape for name, p in Clip(config).state_dict().items()}
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    shapes = [
        f"{n} is {list(weights[n].shape)} instead of {list(expected[n])}"
        for n in sorted(expected.keys() & weights.keys())
        if weights[n].shape != expected[n]
    ]
    problems = [f"missing: {_some(missing)}"] * bool(missing) + [f"unexpected: {_some(unexpected)}"] * bool(unexpected)
    problems += [f"of another shape: {_some(shapes)}"] * bool(shapes)
    if problems:
        raise UserError(
            f"model.init={path} does not fit this model. Weights {'; '.join(problems)}. Check model.preset and the tokenizer."
        )


def _some(unsorted: Iterable[str]) -> str:
    names = sorted(unsorted)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
