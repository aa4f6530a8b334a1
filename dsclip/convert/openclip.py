"""OpenCLIP's weights: what they show of their model, what of it dsclip's towers can't compute, and the files of a folder.

What a configuration says is in `model/openclip_config.py`. Facts of OpenCLIP 3.3.0: its `factory.py` has the names of files in a folder.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dsclip.errors import UserError
from dsclip.model.presets import PRESETS, VARIANTS

CONFIG = "open_clip_config.json"
WEIGHT_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "open_clip_pytorch_model.pt",
)  # fmt: skip

# Part of a weight's name -> the feature that it belongs to.
_IN_NAMES = {
    r"visual\.trunk\.": "an image tower of timm",
    r"visual\.layer\d": "a ResNet as image tower",
    r"visual\.attn_?pool": "attention pooling",
    r"(ln_attn|ln_inner|mlp\.ln)\.": "a norm inside attention or the MLP",
    r"head_scale|attn\.logit_scale": "cosine attention or scaled heads",
    r"text_projection\.bias": "a bias in the text projection",
    r"cls_emb": "a class token in the text tower",
    r"text_decoder\.": "a caption decoder (CoCa)",
    r"text\.(transformer\.(embeddings|encoder|layer)|proj)\.": "a text tower of transformers",
}


def fields_shown(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of ClipConfig that dsclip's weights show by their shapes, {} for weights that are not of such towers."""
    try:
        patches = weights["visual.embed.patch_embedding.weight"].shape
        class_tokens = int("visual.embed.class_embedding" in weights)
        side = round((len(weights["visual.embed.position_embedding"]) - class_tokens) ** 0.5)
        shown = dict(
            embed_dim=weights["visual.head.projection.weight"].shape[0], patch_size=patches[-1],
            image_size=side * patches[-1], context_length=weights["text.embed.position_embedding"].shape[0],
            vocab_size=weights["text.embed.token_embedding"].shape[0], vision_pool="class" if class_tokens else "average",
            vision_registers=0, text_experts=0,
            text_pool="last" if "text.head.projection.bias" in weights else "end",
        )  # fmt: skip
        for tower, name in (("visual", "vision"), ("text", "text")):
            first = f"{tower}.blocks.0.attn"
            shown[f"{name}_layer_scale"] = (
                1e-5 if f"{first}.out.gamma" in weights else None
            )  # where it began is behind it
            shown[f"{name}_qk_norm"] = f"{first}.ln_q.weight" in weights
            shown[f"{name}_width"] = weights[f"{tower}.embed.position_embedding"].shape[1]
            shown[f"{name}_mlp_width"] = weights[f"{tower}.blocks.0.mlp.fc1.weight"].shape[0]
            shown[f"{name}_layers"] = len({m[1] for n in weights if (m := re.match(rf"{tower}\.blocks\.(\d+)\.", n))})
    except (KeyError, IndexError):
        return {}
    return shown


def assumed_fields(shown: dict[str, Any]) -> dict[str, Any]:
    """What a bare state dict leaves open, as OpenCLIP's own models of these shapes have it, or heads 64 wide. Raises UserError."""
    shapes = ("vision_width", "vision_layers", "vision_mlp_width", "text_width", "text_layers", "text_mlp_width")
    for preset in (PRESETS | VARIANTS).values():
        if all(getattr(preset, name) == shown[name] for name in shapes):
            heads = dict(vision_heads=preset.vision_heads, text_heads=preset.text_heads)
            break
    else:
        heads = {f"{tower}_heads": max(1, shown[f"{tower}_width"] // 64) for tower in ("vision", "text")}
    defaults = {
        name: getattr(PRESETS["ViT-B-32"], name) for name in ("activation", "layer_norm_eps", "image_mean", "image_std")
    }
    return heads | defaults | {"eot_token_id": shown["vocab_size"] - 1}


def features_in(names: Iterable[str]) -> list[str]:
    """What weights of these OpenCLIP names need and dsclip's towers lack: `feature (name of a weight)`."""
    found: dict[str, str] = {}
    names = list(names)
    for pattern, feature in _IN_NAMES.items():
        if name := next((n for n in names if re.search(pattern, n)), None):
            found.setdefault(feature, name)
    tower = [n for n in names if "visual.transformer.resblocks." in n]
    if tower and not any(n.endswith("visual.ln_pre.weight") for n in names):
        found["an image tower without its first norm"] = "no visual.ln_pre.weight"
    return [f"{feature} ({name})" for feature, name in found.items()]


def weight_file(folder: Path) -> Path:
    """The weights in a folder that OpenCLIP wrote. Raises UserError when there are none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} has an {CONFIG} and no weights beside it, such as {WEIGHT_FILES[0]} or {WEIGHT_FILES[2]}"
    )


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of an OpenCLIP file, mapped where its format allows. Raises UserError for what isn't plain tensors."""
    if path.suffix == ".safetensors":
        try:
            stored: dict[str, Tensor] = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error})") from error
        return stored
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise UserError(
            f"{path} is no state dict of plain tensors ({type(error).__name__}); it was not opened"
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"{path} holds no state dict")
    return weights
