"""The one way weights come in: what a checkpoint, a HuggingFace folder or an OpenCLIP file says of its model, and the model's weights.

`dsclip.create_model`, `model.init` and `launchers/evaluate.py` read all of these here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from dsclip.checkpoint import Checkpoint, find_checkpoint, read_checkpoint, read_manifest
from dsclip.convert import openclip
from dsclip.convert.finite import finite, finite_scale
from dsclip.convert.hf_folder import open_hf_folder, read_hf_config, training_data
from dsclip.convert.hub import layout_on_hub, local_path
from dsclip.convert.weights import Named, class_token_to_register, from_openclip
from dsclip.errors import UserError
from dsclip.model import ClipConfig
from dsclip.model.config import OF_EXPERTS, OF_THE_RUN, TOWER_OPTIONS
from dsclip.model.openclip_config import read_openclip_config

# What shapes of weights don't show: models that differ in it alone load without a word and compute something else.
HIDDEN = (
    "vision_heads", "text_heads", "activation", "layer_norm_eps", "image_mean", "image_std", "eot_token_id",
)  # fmt: skip
TAKEN = (
    *HIDDEN,
    "vision_pool",
    "text_pool",
    *TOWER_OPTIONS,
    *OF_EXPERTS[1:],
)  # what a model takes over from its weights' source
OWN_CHOICE = ("image_size", "context_length")  # what it may have otherwise


@dataclass(frozen=True)
class Source:
    """A model whose weights are still on the disk. scale: the logit scale as a factor; stored: weights by dsclip's names.

    said: the fields of ClipConfig that the source says; shown: those that the shapes of its weights show, None where it says
    all. preprocessing: how its images are made, if otherwise than dsclip's. logit_bias: a sigmoid loss's. tokenizer_dir,
    train_shards: None where there are none. checkpoint: the dsclip checkpoint that it is. format: dsclip, hf or openclip.
    """

    path: Path
    said: dict[str, Any]
    scale: float
    stored: Mapping[str, Tensor]
    shown: dict[str, Any] | None = None
    preprocessing: str | None = None
    logit_bias: float | None = None
    tokenizer_dir: Path | None = None
    train_shards: str | list[str] | None = None
    checkpoint: Checkpoint | None = None
    format: str = "dsclip"

    def weights(self) -> Named:
        """Each weight by dsclip's name, in the stored dtype, when it is asked for. Raises UserError for values that aren't finite."""
        return finite(self.stored.items(), self.path)

    def config(self, eot_token_id: int | None = None) -> ClipConfig:
        """The model's configuration; what a bare state dict doesn't show is assumed, and `notes` says what that is.

        eot_token_id: the tokenizer's, for a source that doesn't say its own. Raises UserError when that is missing.
        """
        known = (openclip.assumed_fields(self.shown) | self.shown | self.said) if self.shown else dict(self.said)
        if "eot_token_id" not in self.said:
            if eot_token_id is None:
                raise UserError(
                    f"{self.path} doesn't say which token ends a caption, and has no tokenizer; give its tokenizer"
                )
            known["eot_token_id"] = eot_token_id
        return ClipConfig(**known)

    def notes(self, config: ClipConfig, *, of_the_bias: bool = True) -> list[str]:
        """Sentences on what is taken for granted when these weights become the model of this configuration.

        of_the_bias: also that a sigmoid loss's bias is left out.
        """
        open_fields = [f"{name} {_plainly(getattr(config, name))}" for name in HIDDEN if name not in self.said]
        notes = []
        if self.shown is not None:
            notes.append(
                f"{self.path} has no {openclip.CONFIG} beside it: what its weights don't show is assumed: {', '.join(open_fields)}; "
                "the class token is pooled after its norm, the text tower is causal and pooled at the end token"
            )
        elif open_fields:
            notes.append(f"{self.path} doesn't say, and assumed is: {', '.join(open_fields)}")
        if config.text_experts and not self.said.get("text_experts"):
            notes.append(
                f"{self.path} has one MLP in each block of its text tower: each expert begins as a copy of it, and routers are new"
            )
        if self.preprocessing:
            notes.append(f"{self.path} was made for images that are prepared otherwise than here: {self.preprocessing}")
        if of_the_bias and self.logit_bias is not None:
            notes.append(
                f"{self.path} has the bias of a sigmoid loss, {self.logit_bias:.4g}: a run with loss.name=sigmoid begins with it, all else "
                "leaves it out, as features don't depend on it"
            )
        if self.checkpoint is not None and self.checkpoint.heads:
            notes.append(
                f"{self.path} was trained with the heads {', '.join(self.checkpoint.heads)}, which are left out: they are for training alone"
            )
        return notes


def _plainly(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def open_source(path: str | Path, *, average: bool = False) -> Source:
    """A checkpoint, the newest of a run, a HuggingFace folder, an OpenCLIP folder or state dict, or one on the hub, see `local_path`.

    average: of a checkpoint, the moving average of its weights (`optim.ema`). Raises UserError for what is none of these, is
    damaged, has no average that was asked for, or is a model that dsclip's towers can't be.
    """
    layout, path = layout_on_hub(path), local_path(path, weights=True)
    if average and (_is_hf(path, layout) or path.is_file() or (path / openclip.CONFIG).is_file()):
        raise UserError(
            f"--ema: {path} is no checkpoint of a dsclip run, which alone has an average beside its weights"
        )
    if _is_hf(path, layout):
        folder = open_hf_folder(path)
        tokenizer_dir = path if _has_tokenizer(path) else None
        return Source(
            path, folder.said, finite_scale(folder.scale, path), folder.weights, preprocessing=folder.preprocessing,
            logit_bias=folder.logit_bias, tokenizer_dir=tokenizer_dir, train_shards=training_data(path), format="hf",
        )  # fmt: skip
    if path.is_file() or (path / openclip.CONFIG).is_file():
        return _openclip_source(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    checkpoint = read_checkpoint(path, average=average)
    return Source(
        checkpoint.path, _said(checkpoint.config), finite_scale(checkpoint.logit_scale, checkpoint.path),
        checkpoint.state_dict, logit_bias=checkpoint.logit_bias, tokenizer_dir=checkpoint.tokenizer_dir,
        train_shards=checkpoint.recipe.get("data", {}).get("train_shards"), checkpoint=checkpoint,
    )  # fmt: skip


@dataclass(frozen=True)
class Description:
    """What a source says without its weights: fields of ClipConfig, {} for a bare state dict; None without a tokenizer."""

    said: dict[str, Any]
    tokenizer_dir: Path | None


def describe_source(path: str | Path) -> Description:
    """What the source at `path` says of its model; no weight is read. Raises UserError as `open_source` does."""
    layout, path = layout_on_hub(path), local_path(path, weights=False)
    folder = path.parent if path.is_file() else path
    tokenizer_dir = folder if _has_tokenizer(folder) else None
    if _is_hf(path, layout):
        return Description(read_hf_config(path)[0], tokenizer_dir)
    if (folder / openclip.CONFIG).is_file():
        return Description(_openclip_config(folder)[0], tokenizer_dir)
    if path.is_file():
        return Description({}, None)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    checkpoint = find_checkpoint(path)
    known = {f.name for f in fields(ClipConfig)}
    said = {k: v for k, v in read_manifest(checkpoint)["model"].items() if k in known and k not in OF_THE_RUN}
    return Description(said, checkpoint / "tokenizer")


def _said(config: ClipConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in OF_THE_RUN}


def _is_hf(path: Path, layout: str | None) -> bool:
    """Hub folders of OpenCLIP hold both formats; only a bare `config.json` beside OpenCLIP's own weights is none of ours.

    layout: what was asked for, of a model on the hub.
    """
    if layout is not None:
        return layout == "hf"
    openclip_only = (path / openclip.CONFIG).is_file() and not list(path.glob("model*.safetensors"))
    return (path / "config.json").is_file() and not openclip_only


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))


def _openclip_config(folder: Path) -> tuple[dict[str, Any], str | None]:
    said, preprocessing = read_openclip_config(folder / openclip.CONFIG)
    if "eot_token_id" not in said and _has_tokenizer(folder):
        from dsclip.data import load_tokenizer

        said["eot_token_id"] = load_tokenizer(str(folder)).eot_token_id
    return said, preprocessing


def _openclip_source(path: Path) -> Source:
    folder = path.parent if path.is_file() else path
    configured = (folder / openclip.CONFIG).is_file()
    said, preprocessing = _openclip_config(folder) if configured else ({}, None)
    file = path if path.is_file() else openclip.weight_file(folder)
    stored = openclip.read_state_dict(file)
    if missing := openclip.features_in(stored):
        raise UserError(f"{file}: these weights need {', '.join(missing)}; dsclip's towers have no such thing")
    weights, scale, bias = from_openclip(stored)
    if said.get("vision_pool") == "average":
        weights = class_token_to_register(weights)
    shown = None if configured else openclip.fields_shown(weights)
    return Source(
        file, said, finite_scale(scale, file), weights, shown, preprocessing, logit_bias=bias,
        tokenizer_dir=folder if configured and _has_tokenizer(folder) else None, format="openclip",
    )  # fmt: skip
