"""What a CLIP model is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from dsclip.errors import UserError

CHOICES = {
    "activation": ("gelu", "quick_gelu", "gelu_tanh"),
    "vision_pool": ("class", "average", "attention"),
    "text_pool": ("end", "last"),
    "attention": ("auto", "flash", "cudnn", "efficient", "math"),
}
# Beside plain pre-norm blocks: what neither of transformers' models has.
TOWER_OPTIONS = (
    "vision_registers", "vision_layer_scale", "text_layer_scale", "vision_qk_norm", "text_qk_norm", "text_experts",
)  # fmt: skip
OF_EXPERTS = ("text_experts", "text_experts_per_token", "text_experts_every")
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
    vision_registers: int = 0  # learned tokens beside the image's, whose outputs nobody reads, see `VisionEmbed`
    vision_layer_scale: float | None = (
        None  # where the factors of a block's branches begin, see `Linear`; None: there are none
    )
    text_layer_scale: float | None = None
    vision_qk_norm: bool = False  # queries and keys are normalised, see `Attention`
    text_qk_norm: bool = False
    text_experts: int = 0  # MLPs of a routed block, see `RoutedMlp`; 0: no block is routed
    text_experts_per_token: int = 1
    text_experts_every: int = 2  # the last of each so many blocks is routed
    patch_dropout: float = 0.0
    attention: str = "auto"  # auto | flash | cudnn | efficient | math: how it is computed, not what
    fp8: bool = False  # products of the image tower's inner blocks
    layer_norm_eps: float = 1e-5
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("vision_registers", "text_experts") else 1
            if field.type == "int" and field.name != "eot_token_id" and value < least:
                raise UserError(f"model.{field.name} is {value}; it must be at least {least}")
            if field.name.endswith("layer_scale") and value is not None and not 0 < value < math.inf:
                raise UserError(f"model.{field.name} is {value}; it must be greater than 0")
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
        self._check_experts()
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"model.patch_dropout is {self.patch_dropout}; it is a share: 0 ≤ share < 1")
        for name in ("image_mean", "image_std"):
            values = tuple(float(v) for v in getattr(self, name))
            if len(values) != 3:
                raise UserError(f"model.{name} has {len(values)} values; give three, for red, green and blue")
            object.__setattr__(self, name, values)

    def _check_experts(self) -> None:
        if not self.text_experts:
            for name in OF_EXPERTS[1:]:
                if getattr(self, name) != getattr(ClipConfig, name):
                    raise UserError(
                        f"model.{name} is {getattr(self, name)}, and model.text_experts 0: no block is routed; set model.text_experts, or leave model.{name} out"
                    )
            return
        if self.text_experts_per_token > self.text_experts:
            raise UserError(
                f"model.text_experts_per_token is {self.text_experts_per_token}, and model.text_experts {self.text_experts}: a token can't have more"
            )
        if self.text_experts_every > self.text_layers:
            raise UserError(
                f"model.text_experts_every is {self.text_experts_every}, and model.text_layers {self.text_layers}: no block would be routed"
            )

    def routed(self, block: int) -> bool:
        """Whether a block of the text tower, counted from 0, has experts."""
        return self.text_experts > 0 and (block + 1) % self.text_experts_every == 0

    @property
    def routed_blocks(self) -> int:
        """How many blocks have experts."""
        return sum(map(self.routed, range(self.text_layers)))

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
        """Tokens of a whole image; registers are not the image's."""
        return self.class_tokens + self.patches

    @property
    def computed_tokens(self) -> int:
        """Tokens of an image that a block computes in training: registers, class token and visible patches."""
        return self.vision_registers + self.class_tokens + self.visible_patches

    @property
    def visible_patches(self) -> int:
        """Patches of an image that training computes."""
        return max(1, int(self.patches * (1 - self.patch_dropout)))
