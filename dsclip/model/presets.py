"""Models that people ask for by name, or by a configuration of OpenCLIP's."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dsclip.errors import UserError, did_you_mean
from dsclip.model.config import ClipConfig
from dsclip.model.openclip_config import read_model_config

AUTO = "auto"  # the model of the weights that a run starts from, or this preset without any
DEFAULT = "ViT-B-32"


def _vit(
    embed_dim: int, image_size: int, patch_size: int, vision: tuple[int, int, int, int], text: tuple[int, int, int]
) -> ClipConfig:
    v_width, v_layers, v_heads, v_mlp = vision
    t_width, t_layers, t_heads = text
    return ClipConfig(
        embed_dim, image_size, patch_size, v_width, v_layers, v_heads, v_mlp, t_width, t_layers, t_heads, 4 * t_width
    )


# vision: (width, layers, heads, MLP width) · text: (width, layers, heads). As in OpenCLIP's model_configs.
PRESETS: dict[str, ClipConfig] = {
    "ViT-S-32": _vit(384, 224, 32, (384, 12, 6, 1536), (384, 12, 6)),
    "ViT-B-32": _vit(512, 224, 32, (768, 12, 12, 3072), (512, 12, 8)),
    "ViT-B-16": _vit(512, 224, 16, (768, 12, 12, 3072), (512, 12, 8)),
    "ViT-L-14": _vit(768, 224, 14, (1024, 24, 16, 4096), (768, 12, 12)),
    "ViT-L-14-336": _vit(768, 336, 14, (1024, 24, 16, 4096), (768, 12, 12)),
    "ViT-H-14": _vit(1024, 224, 14, (1280, 32, 16, 5120), (1024, 24, 16)),
    "ViT-g-14": _vit(1024, 224, 14, (1408, 40, 16, 6144), (1024, 24, 16)),
    "ViT-bigG-14": _vit(1280, 224, 14, (1664, 48, 16, 8192), (1280, 32, 20)),
    # Ours: small enough for two CPU cores.
    "demo": replace(_vit(128, 64, 16, (128, 4, 4, 512), (128, 2, 4)), context_length=32),
}

# More of OpenCLIP's plain image towers. Searches over models (tools/scaling_laws.py, the GPU bench) leave them out.
VARIANTS: dict[str, ClipConfig] = {
    "ViT-S-16": _vit(384, 224, 16, (384, 12, 6, 1536), (384, 12, 6)),
    "ViT-M-32": _vit(512, 224, 32, (512, 12, 8, 2048), (512, 12, 8)),
    "ViT-M-16": _vit(512, 224, 16, (512, 12, 8, 2048), (512, 12, 8)),
    "ViT-B-32-256": _vit(512, 256, 32, (768, 12, 12, 3072), (512, 12, 8)),
    "ViT-B-32-plus-256": _vit(640, 256, 32, (896, 12, 14, 3584), (640, 12, 10)),
    "ViT-B-16-plus": _vit(640, 224, 16, (896, 12, 14, 3584), (640, 12, 10)),
    "ViT-B-16-plus-240": _vit(640, 240, 16, (896, 12, 14, 3584), (640, 12, 10)),
    "ViT-L-16": _vit(768, 224, 16, (1024, 24, 16, 4096), (768, 12, 12)),
    "ViT-L-16-320": _vit(768, 320, 16, (1024, 24, 16, 4096), (768, 12, 12)),
    "ViT-L-14-280": _vit(768, 280, 14, (1024, 24, 16, 4096), (768, 12, 12)),
    "ViT-H-16": _vit(1024, 224, 16, (1280, 32, 16, 5120), (1024, 24, 16)),
    "ViT-H-14-378": _vit(1024, 378, 14, (1280, 32, 16, 5120), (1024, 24, 16)),
    "ViT-e-14": _vit(1280, 224, 14, (1792, 56, 16, 15360), (1280, 36, 20)),
}

_TOWER_B, _TOWER_L, _TOWER_SO = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1152, 27, 16, 4304)


def _siglip(image_size: int, patch_size: int, tower: tuple[int, int, int, int]) -> ClipConfig:
    """Both towers alike (Zhai et al. 2023); colours from -1 to 1."""
    half = (0.5, 0.5, 0.5)
    return ClipConfig(
        tower[0], image_size, patch_size, *tower, *tower, context_length=64, vocab_size=32000, eot_token_id=1, activation="gelu_tanh",
        vision_pool="attention", text_pool="last", layer_norm_eps=1e-6, image_mean=half, image_std=half,
    )  # fmt: skip


# Under OpenCLIP's names.
SIGLIP: dict[str, ClipConfig] = {
    "ViT-B-16-SigLIP": _siglip(224, 16, _TOWER_B),
    "ViT-L-16-SigLIP-256": _siglip(256, 16, _TOWER_L),
    "ViT-SO400M-14-SigLIP-384": _siglip(384, 14, _TOWER_SO),
}


def resolve_preset(preset: str, **overrides: Any) -> ClipConfig:
    """The configuration of a preset, with every override that is not None applied.

    `ViT-B/32` and `ViT-B-32` are the same; a suffix `-quickgelu` sets the activation; `auto` is `ViT-B-32` here. A name that ends
    in `.json` is a file, see `read_model_config`. Raises UserError for an unknown preset or an unknown field, and for a file
    with what dsclip's towers lack.
    """
    known = [f.name for f in fields(ClipConfig)]
    for key in overrides:
        if key not in known:
            raise UserError(f"a model has no field `{key}`.{did_you_mean(key, known)}")
    given = {
        key: value for key, value in overrides.items() if value is not None
    }  # a recipe gives None for what it leaves open
    if preset.endswith(".json"):
        return ClipConfig(**read_model_config(Path(preset)) | given)
    name = DEFAULT if preset == AUTO else preset.replace("/", "-")
    if name.endswith("-quickgelu"):
        name = name.removesuffix("-quickgelu")
        if given.setdefault("activation", "quick_gelu") != "quick_gelu":
            raise UserError(
                f"model.preset is {preset} and model.activation is {given['activation']}; leave one of them out"
            )
    models = PRESETS | VARIANTS | SIGLIP
    if name not in models:
        raise UserError(
            f"unknown model preset `{preset}`.{did_you_mean(name, list(models))} Known: {', '.join(models)}, or an OpenCLIP model "
            "configuration, FILE.json"
        )
    return replace(models[name], **given)
