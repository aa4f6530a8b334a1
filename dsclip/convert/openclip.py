"""OpenCLIP's models: what `open_clip_config.json` says of one, what its weights show, and what dsclip's towers can't compute.

Facts of OpenCLIP 3.3.0: its `model.py` gives every option's default, `factory.py` the names of files in a folder.
"""

from __future__ import annotations

import json
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
from dsclip.model.config import CLIP_MEAN, CLIP_STD, PRESETS, VARIANTS

CONFIG = "open_clip_config.json"
WEIGHT_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "open_clip_pytorch_model.pt",
)  # fmt: skip

# Option -> (values that dsclip's towers have, what it is called). An option with a plain value changes nothing.
_BLOCK_FEATURES: dict[str, tuple[tuple[Any, ...], str]] = {
    "ls_init_value": ((None,), "layer scale"),
    "block_type": ((None, "default", "custom"), "a block of its own kind"),
    "qk_norm": ((False,), "QK-norm"),
    "scaled_cosine_attn": ((False,), "cosine attention"),
    "scale_heads": ((False,), "a scale for each head"),
    "scale_attn_inner": ((False,), "a norm inside attention"),
    "scale_attn": ((False,), "a norm after attention"),
    "scale_fc": ((False,), "a norm inside the MLP"),
    "act_kwargs": ((None, {}), "an activation with options"),
}
_VISION_FEATURES = _BLOCK_FEATURES | {
    "timm_model_name": ((None, ""), "an image tower of timm"),
    "attentional_pool": ((False,), "attention pooling"),
    "no_ln_pre": ((False,), "an image tower without its first norm"),
    "input_patchnorm": ((False,), "a norm of patches"),
    "global_average_pool": ((False,), "average pooling"),
    "pool_type": (("tok",), "another pooling than the class token's"),
    "pos_embed_type": (("learnable",), "fixed position embeddings"),
}
_TEXT_FEATURES = _BLOCK_FEATURES | {
    "hf_model_name": ((None, ""), "a text tower of transformers"),
    "embed_cls": ((False,), "a class token in the text tower"),
    "no_causal_mask": ((False,), "a text tower without causal mask"),
    "pool_type": (("argmax", "eos"), "another pooling than the end token's"),
    "proj_bias": ((False,), "a bias in the text projection"),
    "proj_type": (("linear",), "a text projection that isn't linear"),
    "tokenizer_mode": ((None, ""), "a tokenizer mode"),
}
_MODEL_FEATURES: dict[str, tuple[tuple[Any, ...], str]] = {
    "multimodal_cfg": ((None,), "a caption decoder (CoCa)"),
}
_READ = {
    "model_cfg": {
        "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale",
        "output_dict",
    },
    # A norm after pooling equals one before it where one token is pooled.
    "vision_cfg": {
        "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout", "norm_kwargs",
        "output_tokens", "final_ln_after_pool", "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained",
        "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path",
    },
    "text_cfg": {
        "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs", "output_tokens", "pad_id",
        "eos_id", "final_ln_after_pool", "hf_tokenizer_name", "tokenizer_kwargs", "hf_model_pretrained", "hf_proj_type",
        "hf_pooler_type",
    },
}  # fmt: skip
# Part of a weight's name -> the feature that it belongs to.
_IN_NAMES = {
    r"visual\.trunk\.": "an image tower of timm",
    r"visual\.layer\d": "a ResNet as image tower",
    r"visual\.attn_?pool": "attention pooling",
    r"ls_\d\.gamma": "layer scale",
    r"(attn\.ln_[qk]|[qk]_norm)\.": "QK-norm",
    r"(ln_attn|ln_inner|mlp\.ln)\.": "a norm inside attention or the MLP",
    r"head_scale|attn\.logit_scale": "cosine attention or scaled heads",
    r"text_projection\.bias": "a bias in the text projection",
    r"cls_emb": "a class token in the text tower",
    r"text_decoder\.": "a caption decoder (CoCa)",
    r"text\.(transformer\.(embeddings|encoder|layer)|proj)\.": "a text tower of transformers",
}


def read_openclip_config(path: Path) -> tuple[dict[str, Any], str | None]:
    """(fields of ClipConfig that the file says, how its images are made if otherwise than dsclip's) of `open_clip_config.json`.

    eot_token_id is among the fields for CLIP's own vocabulary and where the model names it. Raises UserError that names
    every feature that dsclip's towers lack.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model = content["model_cfg"]
        vision, text = model["vision_cfg"], model["text_cfg"]
        missing = _missing_features(model, vision, text)
        if missing:
            raise UserError(f"{path}: this model needs {', '.join(missing)}; dsclip's towers have no such thing")
        return _fields(content, path), _other_preprocessing(content, vision)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no configuration of an OpenCLIP model ({type(error).__name__}: {error})") from error


def _missing_features(model: dict[str, Any], vision: dict[str, Any], text: dict[str, Any]) -> list[str]:
    missing = []
    sections = (
        ("model_cfg", model, _MODEL_FEATURES),
        ("vision_cfg", vision, _VISION_FEATURES),
        ("text_cfg", text, _TEXT_FEATURES),
    )
    for name, section, features in sections:
        prefix = "" if name == "model_cfg" else f"{name}."
        for option, value in section.items():
            plain, feature = features.get(option, ((), "an option that is not known here"))
            if option not in _READ[name] and value not in plain:
                missing.append(f"{feature} ({prefix}{option}: {json.dumps(value)})")
    if isinstance(vision.get("layers"), list):
        missing.append("a ResNet as image tower (vision_cfg.layers is a list)")
    return missing


def _fields(content: dict[str, Any], path: Path) -> dict[str, Any]:
    model, preprocessing = content["model_cfg"], content.get("preprocess_cfg", {})
    vision, text = model["vision_cfg"], model["text_cfg"]
    v_width, t_width = vision.get("width", 768), text.get("width", 512)
    norms = [section.get("norm_kwargs") or {} for section in (vision, text)]
    epsilons = {norm.get("eps", 1e-5) for norm in norms}
    others = {key for norm in norms for key in norm if key != "eps"}
    if len(epsilons) > 1 or others:
        raise UserError(f"{path}: dsclip's norms have one epsilon in both towers, and no other options (norm_kwargs)")
    fields = dict(
        embed_dim=model["embed_dim"], image_size=_square(vision.get("image_size", 224)),
        patch_size=_square(vision.get("patch_size", 16)), vision_width=v_width, vision_layers=vision.get("layers", 12),
        vision_heads=v_width // vision.get("head_width", 64), vision_mlp_width=int(v_width * vision.get("mlp_ratio", 4.0)),
        text_width=t_width, text_layers=text.get("layers", 12), text_heads=text.get("heads", 8),
        text_mlp_width=int(t_width * text.get("mlp_ratio", 4.0)), context_length=text.get("context_length", 77),
        vocab_size=text.get("vocab_size", 49408), activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        layer_norm_eps=epsilons.pop(), vision_pool="class", text_pool="end",
    )  # fmt: skip
    if text.get("pool_type", "argmax") == "eos":
        fields["eot_token_id"] = text.get("eos_id", 2)
    elif fields["vocab_size"] == 49408:
        fields["eot_token_id"] = 49407  # argmax pools at the largest id
    return fields | {
        "image_mean": tuple(preprocessing.get("mean", CLIP_MEAN)), "image_std": tuple(preprocessing.get("std", CLIP_STD)),
    }  # fmt: skip


def _square(size: Any) -> int:
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise ValueError(f"images and patches must be square, not {size}")
    return int(sides.pop())


def _other_preprocessing(content: dict[str, Any], vision: dict[str, Any]) -> str | None:
    says = content.get("preprocess_cfg", {})
    size = _square(vision.get("image_size", 224))
    differs = [
        f"{key} {says[key]}"
        for key, ours in (("interpolation", "bicubic"), ("resize_mode", "shortest"), ("mode", "RGB"))
        if says.get(key, ours) != ours
    ]
    if "size" in says and says["size"] not in (size, [size, size]):
        differs.append(f"size {says['size']}")
    return ", ".join(differs) or None


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
            text_pool="last" if "text.head.projection.bias" in weights else "end",
        )  # fmt: skip
        for tower, name in (("visual", "vision"), ("text", "text")):
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
