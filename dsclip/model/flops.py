"""Floating-point operations of a model, two a multiply-add, as OpenCLIP's model_profile.csv counts them."""

from __future__ import annotations

from dsclip.model.config import ClipConfig


def forward_flops(config: ClipConfig, text_tokens: int | None = None) -> tuple[float, float]:
    """(image, text) FLOPs of one sample's forward. text_tokens: length after cutting; None: the whole context.

    Of routed blocks what a token's experts compute, as if no token were padding.
    """
    c = config
    visible = c.visible_patches
    image = _blocks(c.vision_layers, c.computed_tokens, c.vision_width, c.vision_mlp_width)
    image += 2 * visible * c.vision_width * 3 * c.patch_size**2
    if c.vision_pool == "attention":  # keys and values, one query's attention, output, MLP; the query is one for all
        image += visible * (4 * c.vision_width**2 + 4 * c.vision_width)
        image += 2 * c.vision_width**2 + 4 * c.vision_width * c.vision_mlp_width
    else:
        image += 2 * c.vision_width * c.embed_dim
    tokens = _text_tokens(c, text_tokens)
    text = _blocks(c.text_layers, tokens, c.text_width, c.text_mlp_width) + 2 * c.text_width * c.embed_dim
    further = 2 * c.text_width * c.text_mlp_width * (c.text_experts_per_token - 1) + c.text_width * c.text_experts
    return image, text + c.routed_blocks * 2 * tokens * further


def experts_last_products(config: ClipConfig, text_tokens: int | None = None) -> float:
    """Of the text's FLOPs, those of the second products of routed blocks, which the router's gradient needs."""
    c = config
    return (
        c.routed_blocks * 2 * _text_tokens(c, text_tokens) * c.text_experts_per_token * c.text_width * c.text_mlp_width
    )


def _text_tokens(config: ClipConfig, text_tokens: int | None) -> int:
    return config.context_length if text_tokens is None or config.text_pool == "last" else text_tokens


def _blocks(layers: int, tokens: int, width: int, mlp_width: int) -> float:
    products = 2 * tokens * (4 * width**2 + 2 * width * mlp_width)
    attention = 4 * tokens**2 * width
    return layers * (products + attention)
