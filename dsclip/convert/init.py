"""Weights to start from: a HuggingFace CLIP folder, an OpenCLIP state dict, or a dsclip checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dsclip.checkpoint import read_checkpoint
from dsclip.convert.hf import load_hf_folder
from dsclip.convert.weights import from_openclip
from dsclip.distributed import Collectives
from dsclip.errors import UserError
from dsclip.model import Clip, ClipConfig

POSITION_EMBEDDING = "visual.embed.position_embedding"
CLASS_EMBEDDING = "visual.embed.class_embedding"


def load_init(path: str | Path, config: ClipConfig) -> tuple[dict[str, Tensor], float]:
    """(float32 weights that fit `config`, logit scale as a factor).

    Position embeddings are resized when the image size differs. Raises UserError that names what doesn't fit.
    """
    path = Path(path)
    weights, scale, source = _read(path)
    weights = {name: tensor.float() for name, tensor in weights.items()}
    if source is not None and source.activation != config.activation:
        raise UserError(
            f"{path} was trained with activation {source.activation} and this model has {config.activation}; "
            f"set model.activation={source.activation}"
        )
    if (CLASS_EMBEDDING in weights) != bool(config.class_tokens):
        pool, has = ("class", "has a") if CLASS_EMBEDDING in weights else ("average", "has no")
        raise UserError(
            f"{path} {has} class token and model.vision_pool is {config.vision_pool}; set model.vision_pool={pool}"
        )
    if POSITION_EMBEDDING in weights:
        weights[POSITION_EMBEDDING] = resize_positions(weights[POSITION_EMBEDDING], config.patches, config.class_tokens)
    _check_fit(weights, config, path)
    return weights, scale


def load_init_once(path: str | Path, config: ClipConfig, group: Collectives) -> tuple[dict[str, Tensor] | None, float]:
    """What `load_init` returns, read by rank 0 alone: the others get None and the scale. Collective.

    What rank 0 finds wrong is a UserError on every rank.
    """
    weights: dict[str, Tensor] | None = None
    problem: str | None = None
    scale = 1.0  # rank 0's counts
    if group.rank == 0:
        try:
            weights, scale = load_init(path, config)
        except UserError as error:
            problem = str(error)
        except Exception as error:  # a damaged file raises what its reader likes, and the other ranks wait
            problem = f"model.init={path} could not be read ({type(error).__name__}: {error}); it may be damaged"
    scale, problem = group.broadcast_object((scale, problem))
    if problem:
        raise UserError(problem)
    return weights, scale


def _read(path: Path) -> tuple[dict[str, Tensor], float, ClipConfig | None]:
    if path.is_dir() and (path / "config.json").is_file():
        config, weights, scale = load_hf_folder(path)
        return weights, scale, config
    if path.is_dir():
        checkpoint = read_checkpoint(path)
        return dict(checkpoint.state_dict), checkpoint.logit_scale, checkpoint.config
    if not path.is_file():
        raise UserError(f"model.init={path}: no such file or folder")
    return *from_openclip(_read_state_dict(path)), None


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        stored: dict[str, Tensor] = load_file(path)
        return stored
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"model.init={path} is no state dict of plain tensors ({type(error).__name__}); it was not opened"
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"model.init={path} holds no state dict")
    return weights


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
