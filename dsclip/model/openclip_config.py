"""OpenCLIP's model configurations: what one says of its model, and what in it dsclip's towers can't compute.

Facts of OpenCLIP 3.3.0, whose `model.py` gives every option's default.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from dsclip.errors import UserError
from dsclip.model.config import CLIP_MEAN, CLIP_STD, ClipConfig

WHOLE = {f.name for f in dataclasses.fields(ClipConfig) if f.type == "int"}

# Option -> (values that dsclip's towers have, what it is called). An option with a plain value changes nothing.
_BLOCK_FEATURES: dict[str, tuple[tuple[Any, ...], str]] = {
    "block_type": ((None, "default", "custom"), "a block of its own kind"),
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
    "pool_type": (("tok", "avg"), "another pooling than the class token's or the average"),
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
# What a run begins with, not its model.
_OF_THE_LOSS = {
    "init_logit_scale": "loss.init_temperature, of which {} is the inverse's logarithm,",
    "init_logit_bias": "loss.name=sigmoid loss.init_bias={}",
}
_READ = {
    "model_cfg": {
        "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale",
        "output_dict",
    },
    # A norm after pooling equals one before it where one token is pooled.
    "vision_cfg": {
        "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout", "norm_kwargs", "ls_init_value", "qk_norm",
        "output_tokens", "final_ln_after_pool", "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained",
        "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path",
    },
    "text_cfg": {
        "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs", "ls_init_value", "qk_norm", "output_tokens", "pad_id",
        "eos_id", "final_ln_after_pool", "hf_tokenizer_name", "tokenizer_kwargs", "hf_model_pretrained", "hf_proj_type",
        "hf_pooler_type",
    },
}  # fmt: skip


def read_openclip_config(path: Path) -> tuple[dict[str, Any], str | None]:
    """(fields of ClipConfig that the file says, how its images are made if otherwise than dsclip's) of `open_clip_config.json`.

    eot_token_id is among the fields for CLIP's own vocabulary and where the model names it. Raises UserError that names
    every feature that dsclip's towers lack.
    """
    return _read(path, _content(path))


def read_model_config(path: Path) -> dict[str, Any]:
    """The fields of ClipConfig of a model that is to be trained: of a file as in OpenCLIP's `model_configs`, or an `open_clip_config.json`.

    The end token of another vocabulary than CLIP's is the largest id, at which OpenCLIP pools. Raises UserError that names what
    dsclip's towers lack, and for what isn't a model's but a run's.
    """
    content = _content(path)
    if "model_cfg" not in content:
        content = {"model_cfg": content}
    said, preprocessing = _read(path, content)
    if preprocessing:
        raise UserError(
            f"{path}: images are not prepared like this here: {preprocessing}; leave it out of preprocess_cfg"
        )
    model = content["model_cfg"]
    for key, instead in _OF_THE_LOSS.items():
        if model.get(key) is not None:
            raise UserError(
                f"{path}: {key} is a run's here: leave it out, and set {instead.format(model[key])} in the recipe"
            )
    said.setdefault("eot_token_id", said["vocab_size"] - 1)
    return said | {"patch_dropout": model["vision_cfg"].get("patch_dropout", 0.0)}


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no configuration of an OpenCLIP model ({type(error).__name__}: {error})") from error
    return content if isinstance(content, dict) else {}


def _read(path: Path, content: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    try:
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
    if vision.get("pool_type") == "avg" and vision.get("final_ln_after_pool"):
        missing.append(
            "the norm of an average, where dsclip averages what is normalised (vision_cfg.final_ln_after_pool: true)"
        )
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
        layer_norm_eps=epsilons.pop(), vision_pool="class", text_pool="end", vision_registers=0, text_experts=0,
    )  # fmt: skip
    if vision.get("pool_type") == "avg":  # its class token takes part in the blocks, and is no part of the average
        fields |= {"vision_pool": "average", "vision_registers": 1}
    for tower, section in (("vision", vision), ("text", text)):
        fields[f"{tower}_layer_scale"] = section.get("ls_init_value")
        # OpenCLIP's default block hasn't it, whatever the option says.
        fields[f"{tower}_qk_norm"] = bool(section.get("qk_norm")) and section.get("block_type") != "default"
    if text.get("pool_type", "argmax") == "eos":
        fields["eot_token_id"] = text.get("eos_id", 2)
    elif fields["vocab_size"] == 49408:
        fields["eot_token_id"] = 49407  # argmax pools at the largest id
    for name in WHOLE & fields.keys():
        if type(fields[name]) is not int:
            raise TypeError(f"{name} is {fields[name]!r}, not a whole number")
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
