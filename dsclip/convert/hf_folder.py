"""HuggingFace folders, read: the configuration of a `CLIPModel` or `SiglipModel`, its preprocessing, and its weights when they are asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dsclip.convert.hf import HF_ACTIVATIONS, TRAINING_DATA
from dsclip.convert.weights import parts_in_hf
from dsclip.data import load_tokenizer
from dsclip.engine.consolidate import ShardedWeights
from dsclip.errors import UserError
from dsclip.model import ClipConfig

OF_CLIP = {"logit_scale", "text_projection.weight", "visual_projection.weight"}
OF_SIGLIP = {"logit_scale", "logit_bias", "text_model.head.weight", "vision_model.head.probe"}
INDEX = "model.safetensors.index.json"
# What dsclip does to images, as image processors call it.
PLAIN_PROCESSOR = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 3}


def training_data(path: Path) -> str | list[str] | None:
    """The training shards of a folder that dsclip wrote; None for others."""
    shards = _read_json(path / TRAINING_DATA).get("train_shards") if (path / TRAINING_DATA).is_file() else None
    return shards if isinstance(shards, str | list) else None


@dataclass(frozen=True)
class HfFolder:
    """A folder of either whose weights are still on the disk. scale: the logit scale as a factor; logit_bias: SigLIP's.

    weights: by dsclip's names, in the stored dtype, each put together when it is asked for. said: the fields of ClipConfig that its configuration says. preprocessing: how its images are made, if otherwise than dsclip's.
    """

    path: Path
    said: dict[str, Any]
    preprocessing: str | None
    scale: float
    weights: Mapping[str, Tensor]
    logit_bias: float | None = None

    @property
    def config(self) -> ClipConfig:
        """Raises UserError when the folder doesn't say which token ends a caption."""
        if "eot_token_id" not in self.said:
            raise UserError(
                f"{self.path} says eos_token_id 2, which means the largest id of a caption, of a vocabulary that isn't CLIP's, and "
                "has no tokenizer that would name the end token; put its tokenizer's files there"
            )
        return ClipConfig(**self.said)


def open_hf_folder(path: Path) -> HfFolder:
    """Reads the configuration of a CLIPModel or SiglipModel folder and looks for its safetensors.

    Raises UserError for folders that hold another kind of model, and for a model that is damaged or not whole.
    """
    said, preprocessing = read_hf_config(path)
    files = _weight_files(path)
    stored = _mapped(files)
    siglip = said["vision_pool"] == "attention"
    if absent := (OF_SIGLIP if siglip else OF_CLIP) - stored.keys():
        kind = "SiglipModel, with both towers and heads" if siglip else "CLIPModel, with both towers and projections"
        raise UserError(f"{path} has no {' and no '.join(sorted(absent))}: it is no whole {kind}")
    parts = parts_in_hf(stored)
    weights = ShardedWeights(
        {
            ours: partial(_joined, files, theirs) if len(theirs) > 1 else partial(stored.__getitem__, theirs[0])
            for ours, theirs in parts.items()
        }
    )
    bias = float(stored["logit_bias"]) if siglip else None
    return HfFolder(path, said, preprocessing, math.exp(float(stored["logit_scale"])), weights, bias)


def _joined(files: list[Path], names: Sequence[str]) -> Tensor:
    """One matrix of several tensors, from mappings that end here: pages of a mapping stay in memory as long as any of its tensors lives."""
    parts: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            parts |= {name: file.get_tensor(name) for name in names if name in file.keys()}  # noqa: SIM118, it is no dictionary
    return torch.cat([parts[name] for name in names])


def load_hf_folder(path: Path) -> tuple[ClipConfig, dict[str, Tensor], float]:
    """(configuration, float32 weights by dsclip's names, logit scale) of a CLIPModel folder. Raises as `open_hf_folder`."""
    folder = open_hf_folder(Path(path))
    return folder.config, {name: tensor.float() for name, tensor in folder.weights.items()}, folder.scale


def _weight_files(path: Path) -> list[Path]:
    """The files that transformers would read: one, or those of the index; never variants that lie beside them."""
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not (path / INDEX).is_file():
        raise UserError(f"{path} has no model.safetensors; pickled weights (.bin) are not read, convert them first")
    places = _read_json(path / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{path / INDEX} has no weight_map")
    files = [path / Path(name).name for name in sorted(set(places.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{path} lacks {', '.join(missing)}, which {INDEX} names")
    return files


def _mapped(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files, which are mapped: none is in memory before it is used."""
    stored: dict[str, Tensor] = {}
    for path in files:
        try:
            stored |= load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error})") from error
    return stored


def read_hf_config(path: Path) -> tuple[dict[str, Any], str | None]:
    """(the fields of ClipConfig that a CLIPModel or SiglipModel folder says, how its images are made if otherwise than dsclip's).

    Raises UserError for another kind of model, or one that dsclip's towers can't be.
    """
    full, siglip = _full_config(path)
    text, vision = full.text_config, full.vision_config
    activations = {theirs: ours for ours, theirs in HF_ACTIVATIONS.items()}
    if vision.hidden_act not in activations:
        raise UserError(f"{path} has the activation {vision.hidden_act}; dsclip has {', '.join(activations)}")
    if text.hidden_act != vision.hidden_act or text.layer_norm_eps != vision.layer_norm_eps:
        raise UserError(f"{path}: the towers differ in activation or layer_norm_eps, which dsclip's can't")
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int) or vision.num_channels != 3:
        raise UserError(f"{path}: dsclip's images are square and have three colours, and so are patches")
    said = dict(
        embed_dim=vision.hidden_size if siglip else full.projection_dim, image_size=vision.image_size, patch_size=vision.patch_size,
        vision_width=vision.hidden_size, vision_layers=vision.num_hidden_layers,
        vision_heads=vision.num_attention_heads, vision_mlp_width=vision.intermediate_size,
        text_width=text.hidden_size, text_layers=text.num_hidden_layers, text_heads=text.num_attention_heads,
        text_mlp_width=text.intermediate_size, context_length=text.max_position_embeddings,
        vocab_size=text.vocab_size, activation=activations[vision.hidden_act], layer_norm_eps=vision.layer_norm_eps,
        vision_pool="attention" if siglip else "class", text_pool="last" if siglip else "end",
    )  # fmt: skip
    end = _padding_token(text.pad_token_id, path) if siglip else _end_token(text.eos_token_id, text.vocab_size, path)
    if end is not None:
        said["eot_token_id"] = end
    colours, preprocessing = _preprocessing(path, vision.image_size)
    return said | colours, preprocessing


def _full_config(path: Path) -> tuple[Any, bool]:
    """(transformers' configuration, with the many defaults that published files leave out, whether it is of a SiglipModel)."""
    from transformers import CLIPConfig, SiglipConfig

    config = _read_json(path / "config.json")
    kinds = {"clip": CLIPConfig, "siglip": SiglipConfig}
    kind = config.get("model_type")
    if kind not in kinds:
        raise UserError(
            f"{path} holds a {kind!r} model; only CLIPModel and SiglipModel folders (model_type clip, siglip) are read"
        )
    known = {k: config[k] for k in ("text_config", "vision_config", "projection_dim") if k in config}
    try:
        full = kinds[kind].from_dict(known)
    except Exception as error:  # its checks raise classes of their own
        raise UserError(f"{path / 'config.json'} is no configuration of a {kind} model ({error})") from error
    if kind == "siglip" and full.text_config.projection_size != full.vision_config.hidden_size:
        raise UserError(
            f"{path}: text features are {full.text_config.projection_size} wide, and images' {full.vision_config.hidden_size}"
        )
    if kind == "siglip" and not getattr(full.vision_config, "vision_use_head", True):
        raise UserError(f"{path}: its image tower has no pooling head (vision_use_head is false)")
    return full, kind == "siglip"


def _padding_token(pad_token_id: int, path: Path) -> int:
    """SigLIP's end token, which is also its padding; nothing is computed from it, as the last position is pooled."""
    return load_tokenizer(str(path)).eot_token_id if _has_tokenizer(path) else pad_token_id


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))


def _end_token(eos_token_id: object, vocab_size: int, path: Path) -> int | None:
    """The end token; None when the folder doesn't say.

    2 is a legacy of published folders: transformers then pools at a caption's largest id, the end token of CLIP's vocabulary.
    With tokens that were added behind it, the tokenizer knows.
    """
    if isinstance(eos_token_id, int) and eos_token_id != 2:
        return eos_token_id
    if _has_tokenizer(path):
        return load_tokenizer(str(path)).eot_token_id
    return 49407 if vocab_size == 49408 else None


def _preprocessing(path: Path, image_size: int) -> tuple[dict[str, Any], str | None]:
    """({image_mean, image_std}, what else differs from dsclip's preprocessing) as the folder's image processor has them."""
    says: dict[str, Any] = {}
    if (path / "processor_config.json").is_file():  # transformers 5 writes it, and reads it first
        says = _read_json(path / "processor_config.json").get("image_processor") or {}
    if not says and (path / "preprocessor_config.json").is_file():
        says = _read_json(path / "preprocessor_config.json")
    colours: dict[str, Any] = {k: tuple(says[k]) for k in ("image_mean", "image_std") if k in says}
    size, crop = says.get("size", image_size), says.get("crop_size", image_size)
    differs = [
        f"{key} {says[key]}" for key in PLAIN_PROCESSOR if says.get(key, PLAIN_PROCESSOR[key]) != PLAIN_PROCESSOR[key]
    ]
    if size not in (image_size, {"shortest_edge": image_size}):
        differs.append(f"size {size}")
    if crop not in (image_size, {"height": image_size, "width": image_size}):
        differs.append(f"crop_size {crop}")
    return colours, ", ".join(differs) or None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}: it is no HuggingFace model folder") from error
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content
