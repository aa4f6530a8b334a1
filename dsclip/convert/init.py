"""Weights to start from, fitted to the model that is to be trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsclip.convert.source import OWN_CHOICE, TAKEN, Source, open_source, said_config
from dsclip.distributed import Collectives
from dsclip.errors import UserError
from dsclip.model import Clip, ClipConfig, resolve_preset

IMAGE_POSITIONS = "visual.embed.position_embedding"
TEXT_POSITIONS = "text.embed.position_embedding"


def starting_config(path: str | Path | None, preset: str, **overrides: Any) -> ClipConfig:
    """The preset with its overrides, and from the source of its weights what their shapes don't show.

    So the source's activation, heads, norms, colours and end token are not forgotten. An override that is given keeps its
    value; where it contradicts the source, `load_init` refuses. path: None for a model without a source. Raises UserError.
    """
    if path is None:
        return resolve_preset(preset, **overrides)
    given = {name for name, value in overrides.items() if value is not None}
    if preset.endswith("-quickgelu"):
        given.add("activation")
    said = said_config(path)
    taken = {name: said[name] for name in TAKEN if name in said and name not in given}
    return resolve_preset(preset, **overrides | taken)


def load_init(path: str | Path, config: ClipConfig) -> tuple[dict[str, Tensor], float]:
    """(float32 weights that fit `config`, logit scale as a factor), as `fitted_weights`."""
    return fitted_weights(open_source(path), config)


def fitted_weights(source: Source, config: ClipConfig) -> tuple[dict[str, Tensor], float]:
    """(float32 weights that fit `config`, logit scale as a factor).

    Position embeddings are resized where the image size or the context length differs. Raises UserError that names what
    doesn't fit.
    """
    _check_said(source, config)
    weights = {name: tensor.float() for name, tensor in source.weights()}
    if IMAGE_POSITIONS in weights:
        weights[IMAGE_POSITIONS] = resize_positions(weights[IMAGE_POSITIONS], config.patches, config.class_tokens)
    if TEXT_POSITIONS in weights:
        weights[TEXT_POSITIONS] = resize_text_positions(weights[TEXT_POSITIONS], config.context_length)
    _check_fit(weights, config, source.path)
    return weights, source.scale


def _check_said(source: Source, config: ClipConfig) -> None:
    """Raises UserError that names the fields in which the source and the configuration contradict each other."""
    said = (source.shown or {}) | source.said
    contradictions = {
        name: (value, getattr(config, name))
        for name, value in said.items()
        if name not in OWN_CHOICE and _listed(value) != _listed(getattr(config, name))
    }
    if contradictions:
        differences = ", ".join(
            f"{name} {_listed(theirs)} against {_listed(ours)}" for name, (theirs, ours) in contradictions.items()
        )
        settings = " ".join(
            f"model.{name}={_listed(theirs)}" for name, (theirs, _) in contradictions.items() if name in TAKEN
        )
        advice = (
            "Choose model.preset and data.tokenizer to match"
            if not settings
            else f"Leave out what says otherwise, or set {settings}"
        )
        raise UserError(f"model.init={source.path} is another model than this one: {differences}. {advice}.")


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class InitialWeights:
    """What a run starts from. weights: None on all ranks but 0. notes: what was taken for granted, in sentences."""

    weights: dict[str, Tensor] | None
    scale: float
    notes: list[str]


def load_init_once(path: str | Path, config: ClipConfig, group: Collectives) -> InitialWeights:
    """What `load_init` returns, read by rank 0 alone. Collective.

    What rank 0 finds wrong is a UserError on every rank.
    """
    weights: dict[str, Tensor] | None = None
    problem: str | None = None
    scale, notes = 1.0, list[str]()  # rank 0's count
    if group.rank == 0:
        try:
            source = open_source(path)
            weights, scale = fitted_weights(source, config)
            notes = source.notes(config)
        except UserError as error:
            problem = str(error)
        except Exception as error:  # a damaged file raises what its reader likes, and the other ranks wait
            problem = f"model.init={path} could not be read ({type(error).__name__}: {error}); it may be damaged"
    scale, notes, problem = group.broadcast_object((scale, notes, problem))
    if problem:
        raise UserError(problem)
    return InitialWeights(weights, scale, notes)


def resize_positions(positions: Tensor, patches: int, class_tokens: int = 1) -> Tensor:
    """[c + old patches, width] -> [c + patches, width]: bicubic with antialias over the grid, as OpenCLIP does.

    class_tokens: c, which stand before the patches and stay.
    """
    old = len(positions) - class_tokens
    if old == patches:
        return positions
    old_side, side = round(old**0.5), round(patches**0.5)
    grid = positions[class_tokens:].T.reshape(1, -1, old_side, old_side)
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:class_tokens], resized[0].flatten(1).T])


def resize_text_positions(positions: Tensor, context: int) -> Tensor:
    """[old context, width] -> [context, width]: longer by linear interpolation, as OpenCLIP does; shorter by cutting off.

    Cut, a caption that fits keeps its features exactly; OpenCLIP interpolates here too, which moves every position.
    """
    if context <= len(positions):
        return positions[:context]
    return F.interpolate(positions.T[None], size=context, mode="linear", align_corners=False)[0].T.contiguous()


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
