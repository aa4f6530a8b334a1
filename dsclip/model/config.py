"""What a CLIP model is made of, and the presets people ask for by name."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from dsclip.errors import UserError, did_you_mean

AUTO = "auto"  # the model of the weights that a run starts from, or this preset without any
DEFAULT = "ViT-B-32"
CHOICES = {
    "activation": ("gelu", "quick_gelu", "gelu_tanh"),
    "vision_pool": ("class", "average", "attention"),
    "text_pool": ("end", "last"),
    "attention": ("auto", "flash", "cudnn", "efficient", "math"),
}
# Fields that say how a model is trained here: the weights fit a model with others.
OF_THE_RUN = ("patch_dropout", "attention", "fp8")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipConfig:
    """Shapes of both towers. Flat, so that every field can be overridden by its own name."""

    embed_dim: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp_width: int
    text_width: int
    text_layers: int
    text_heads: int
    text_mlp_width: int
    context_length: int = 77
    vocab_size: int = 49408
    eot_token_id: int = 49407
    activation: str = "gelu"  # see `ACTIVATIONS`; not visible in the weights
    vision_pool: str = (
        "class"  # class (token) | average (of the patches) | attention (SigLIP's tower, see `VisionHead`)
    )
    text_pool: str = "end"  # end (token, causal) | last (position: SigLIP's tower, in which all tokens see each other)
    patch_dropout: float = 0.0
    attention: str = "auto"  # auto | flash | cudnn | efficient | math: how it is computed, not what
    fp8: bool = False  # products of the image tower's inner blocks
    layer_norm_eps: float = 1e-5
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and field.name != "eot_token_id" and value < 1:
                raise UserError(f"model.{field.name} is {value}; it must be at least 1")
        if not 0 <= self.eot_token_id < self.vocab_size:
            raise UserError(
                f"model.eot_token_id is {self.eot_token_id}, and model.vocab_size {self.vocab_size}: no caption could hold that end token, "
                "where the text tower is pooled; give the tokenizer's own eot_token_id beside vocab_size"
            )
        if self.image_size % self.patch_size and self.vision_pool != "attention":  # SigLIP leaves a margin out
            raise UserError(f"model.image_size {self.image_size} is no multiple of model.patch_size {self.patch_size}")
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise UserError(f"model.{tower}_width {width} is no multiple of model.{tower}_heads {heads}")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"model.{name} is `{value}`; choose from {', '.join(choices)}")
        if self.vision_pool == "attention" and self.embed_dim != self.vision_width:
            raise UserError(
                f"model.embed_dim is {self.embed_dim} and model.vision_width {self.vision_width}: with vision_pool attention the image tower "
                "has no projection, and both must be equal"
            )
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"model.patch_dropout is {self.patch_dropout}; it is a share: 0 ≤ share < 1")
        for name in ("image_mean", "image_std"):
            values = tuple(float(v) for v in getattr(self, name))
            if len(values) != 3:
                raise UserError(f"model.{name} has {len(values)} values; give three, for red, green and blue")
            object.__setattr__(self, name, values)

    @property
    def patches(self) -> int:
        """Image patches a sample, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def class_tokens(self) -> int:
        """Tokens before the patches: one or none."""
        return 1 if self.vision_pool == "class" else 0

    @property
    def image_tokens(self) -> int:
        """Tokens of a whole image."""
        return self.class_tokens + self.patches

    @property
    def visible_patches(self) -> int:
        """Patches of an image that training computes."""
        return max(1, int(self.patches * (1 - self.patch_dropout)))


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

    `ViT-B/32` and `ViT-B-32` are the same; a suffix `-quickgelu` sets the activation; `auto` is `ViT-B-32` here.
    Raises UserError for an unknown preset or an unknown field.
    """
    name = DEFAULT if preset == AUTO else preset.replace("/", "-")
    if name.endswith("-quickgelu"):
        name = name.removesuffix("-quickgelu")
        if overrides.get("activation") not in (None, "quick_gelu"):  # a recipe gives None for what it leaves open
            raise UserError(
                f"model.preset is {preset} and model.activation is {overrides['activation']}; leave one of them out"
            )
        overrides["activation"] = "quick_gelu"
    models = PRESETS | VARIANTS | SIGLIP
    if name not in models:
        raise UserError(
            f"unknown model preset `{preset}`.{did_you_mean(name, list(models))} Known: {', '.join(models)}"
        )
    known = [f.name for f in fields(ClipConfig)]
    for key in overrides:
        if key not in known:
            raise UserError(f"a model has no field `{key}`.{did_you_mean(key, known)}")
    return replace(models[name], **{k: v for k, v in overrides.items() if v is not None})
