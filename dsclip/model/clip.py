"""The two-tower model: images and tokens in, unit embeddings out. No temperature: that belongs to the engine.

Shapes: n samples, L tokens of the context, D embedding width.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from dsclip.errors import UserError
from dsclip.model.blocks import Block
from dsclip.model.captions import Captions, cut_captions, end_positions
from dsclip.model.config import ClipConfig
from dsclip.model.experts import RoutedBlock
from dsclip.model.host_memory import HostLine
from dsclip.model.layer_major import ChunkedPass, Chunks, dummy_input
from dsclip.model.towers import TextEmbed, TextHead, VisionEmbed, VisionHead


class Encoder(Protocol):
    """Both towers as the engine calls them: a `Clip`, DeepSpeed's engine around one, or a moving average of one."""

    def __call__(
        self,
        images: Tensor | None,
        tokens: Tensor | Captions | None,
        *,
        chunk_size: int | None = None,
        checkpointing: str = "none",
        visible_patches: Tensor | None = None,
        token_wise: bool = False,
        with_named: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(image features, text features); shapes and meanings as in `Clip.forward`."""


class Tower(nn.Module):
    """Embed, blocks, head: each a `Layer`, run one after the other over all chunks.

    locked: so many of the first layers are frozen and run without a graph, see `lock_tower`.
    """

    locked = 0

    def __init__(self, embed: VisionEmbed | TextEmbed, blocks: list[Block], head: VisionHead | TextHead):
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(
        self,
        chunks: Chunks,
        checkpointing: str,
        embed_contexts: tuple[Chunks, ...] = (),
        head_contexts: tuple[Chunks, ...] = (),
        routed_contexts: tuple[Chunks, ...] = (),
    ) -> Chunks:
        host = HostLine()
        of_blocks = (routed_contexts if isinstance(block, RoutedBlock) else () for block in self.blocks)
        contexts = (embed_contexts, *of_blocks, head_contexts)
        layers = [
            (layer, ChunkedPass(checkpointing, c, host)) for layer, c in zip(self.layers(), contexts, strict=True)
        ]
        with torch.no_grad():
            for layer, chunked in layers[: self.locked]:
                chunks = layer(None, *chunks, chunked=chunked)
        dummy = dummy_input(chunks[0].device)  # for the first layer with a graph: its chunks have no gradient
        for layer, chunked in layers[self.locked :]:
            chunks = layer(dummy, *chunks, chunked=chunked)
            dummy = None
        host.leave()
        return chunks

    @property
    def all_locked(self) -> bool:
        """Whether nothing of the tower has a graph."""
        return self.locked == len(self.blocks) + 2

    def layers(self) -> list[nn.Module]:
        """In the order in which they run."""
        return [self.embed, *self.blocks, self.head]


class Clip(nn.Module):
    """CLIP's image and text encoders (Radford et al. 2021), built for layer-major accumulation.

    `forward(images, tokens)`: images [n, 3, S, S] (uint8, or float already normalised), tokens [n, L] int64 in host
    memory, or `Captions` cut from them beforehand (tokens on a GPU are read back for that);
    returns unit features ([n, D], [n, D]) in float32. Either input may be None, and so are its features then.
    chunk_size: samples that go through a layer together (None: all of them). checkpointing: what layers save for
    backward, see `ChunkedPass`. visible_patches [n, K]: those that patch dropout leaves. token_wise: features of all
    tokens instead, [n, T, D] and [n, context, D]. with_named: what a tower's named heads give stands behind its features, see `add_heads`.
    """

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = c = config
        vision = [
            Block(c.vision_width, c.vision_heads, c.vision_mlp_width, c.activation, c.layer_norm_eps,
                  causal=False, text_layers=None, backend=c.attention, fp8=c.fp8 and 0 < i < c.vision_layers - 1,
                  layer_scale=c.vision_layer_scale, qk_norm=c.vision_qk_norm)
            for i in range(c.vision_layers)
        ]  # fmt: skip
        self.visual = Tower(VisionEmbed(c), vision, VisionHead(c))
        routed = partial(RoutedBlock, experts=c.text_experts, per_token=c.text_experts_per_token)
        text = [
            (routed if c.routed(i) else Block)(
                c.text_width, c.text_heads, c.text_mlp_width, c.activation, c.layer_norm_eps,
                causal=c.text_pool == "end", text_layers=c.text_layers, backend=c.attention,
                layer_scale=c.text_layer_scale, qk_norm=c.text_qk_norm)
            for i in range(c.text_layers)
        ]  # fmt: skip
        self.text = Tower(TextEmbed(c), text, TextHead(c))

    def forward(
        self,
        images: Tensor | None = None,
        tokens: Tensor | Captions | None = None,
        *,
        chunk_size: int | None = None,
        checkpointing: str = "none",
        visible_patches: Tensor | None = None,
        token_wise: bool = False,
        with_named: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        image_features = text_features = None
        for head in (self.visual.head, self.text.head):
            head.token_wise, head.with_named = token_wise, with_named
        if images is not None:
            self._check_images(images)
            contexts = () if visible_patches is None else (_split(visible_patches, chunk_size),)
            image_features = torch.cat(self.visual(_split(images, chunk_size), checkpointing, contexts))
        if tokens is not None:
            captions = tokens
            if isinstance(captions, Tensor):
                device = next(self.text.parameters()).device
                if device.type == "meta":  # weights that are fetched for each layer, which moves its inputs to them
                    device = captions.device
                captions = cut_captions(captions, self.config, chunk_size, device)
            ends = (captions.ends,)
            text_features = captions.in_order(self.text(captions.chunks, checkpointing, (), ends, ends))
        return image_features, text_features

    def valid_tokens(self, tokens: Tensor) -> Tensor:
        """[n, context] bool: the tokens of each caption up to its end token. tokens [n, L]."""
        positions = torch.arange(self.config.context_length, device=tokens.device)
        return positions <= end_positions(tokens, self.config)[:, None]

    def _check_images(self, images: Tensor) -> None:
        size = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise UserError(f"images have shape {tuple(images.shape)}; this model takes [n, 3, {size}, {size}]")

    def parameter_count(self) -> int:
        """Parameters of both towers, also under ZeRO-3, where each rank holds a part only."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.parameters())


def _split(x: Tensor, chunk_size: int | None) -> Chunks:
    return (x,) if chunk_size is None else x.split(chunk_size)
