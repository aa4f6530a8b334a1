"""Other trainers of the same model: a plain step, and accumulation with cached features as OpenCLIP's --accum-freq.

Both keep float32 weights under bf16 autocast with torch's AdamW, as their own training scripts do; on a GPU the fused one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dsclip.data import Batch
from dsclip.model import ClipConfig

Features = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # unit image and text features, scale


@dataclass(frozen=True)
class Peer:
    """Another trainer. step: one optimizer step on a batch; returns the loss [] before it, in nats."""

    model: torch.nn.Module
    step: Callable[[Batch], Tensor]


class MakePeer(Protocol):
    """Builds a trainer. micro_batch: samples of a forward, None: all at once. compiled: its towers by torch.compile."""

    def __call__(self, config: ClipConfig, micro_batch: int | None, *, compiled: bool = False) -> Peer: ...


def hugging_face(config: ClipConfig, micro_batch: int | None, *, compiled: bool = False) -> Peer:
    """transformers' CLIPModel, with its attention by torch's `scaled_dot_product_attention`."""
    from transformers import CLIPConfig, CLIPModel

    from dsclip.convert.hf import hf_config

    settings = CLIPConfig(**hf_config(config, bos_token_id=None), attn_implementation="sdpa")
    model = CLIPModel(settings)
    run = torch.compile(model) if compiled else model

    def features(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = run(pixel_values=images, input_ids=tokens)
        return out.image_embeds, out.text_embeds, model.logit_scale.exp()

    return _trainer(model, features, config, micro_batch)


def open_clip(config: ClipConfig, micro_batch: int | None, *, compiled: bool = False) -> Peer:
    """OpenCLIP's own model, where the package `open_clip_torch` is installed."""
    import open_clip as package

    names = {"embed_dim": config.embed_dim}
    vision = {"image_size": config.image_size, "layers": config.vision_layers, "width": config.vision_width,
              "head_width": config.vision_width // config.vision_heads, "patch_size": config.patch_size,
              "mlp_ratio": config.vision_mlp_width / config.vision_width}  # fmt: skip
    text = {"context_length": config.context_length, "vocab_size": config.vocab_size, "width": config.text_width,
            "heads": config.text_heads, "layers": config.text_layers}  # fmt: skip
    model = package.CLIP(**names, vision_cfg=vision, text_cfg=text)
    run = torch.compile(model) if compiled else model

    def features(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text, scale, *_ = run(images, tokens)
        return image, text, scale

    return _trainer(model, features, config, micro_batch)


PEERS: dict[str, MakePeer] = {"transformers": hugging_face, "open_clip": open_clip}


def installed_peers() -> list[str]:
    """The names of the peers that can be measured here."""
    return [name for name in PEERS if importlib.util.find_spec(name)]


def _trainer(model: torch.nn.Module, features: Features, config: ClipConfig, micro_batch: int | None) -> Peer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    fused = True if device.type == "cuda" else None
    adamw = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=fused)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (config.image_mean, config.image_std))

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            return features((images.to(device).float() / 255 - mean) / std, tokens.to(device))

    def step(batch: Batch) -> Tensor:
        adamw.zero_grad()
        size = micro_batch or len(batch)
        parts = list(zip(batch.images.split(size), batch.tokens.split(size), strict=True))
        if len(parts) == 1:
            loss = _loss(*encode(*parts[0]))
            loss.backward()
        else:
            loss = _accumulate(encode, parts)
        adamw.step()
        return loss.detach()

    return Peer(model, step)


def _accumulate(encode: Features, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    with torch.no_grad():
        cached = [encode(*part)[:2] for part in parts]
    for index, part in enumerate(parts):
        image, text, scale = encode(*part)
        whole = [*cached[:index], (image, text), *cached[index + 1 :]]
        loss = _loss(torch.cat([i for i, _ in whole]), torch.cat([t for _, t in whole]), scale)
        loss.backward()
    return loss


def _loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
