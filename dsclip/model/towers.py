"""The layers at both ends of a tower: pixels or tokens in, embeddings out.

Shapes: B samples of a chunk, P patches, K visible patches, T tokens, W width, D embedding width.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsclip.model.attention_pool import AttentionPool
from dsclip.model.blocks import Linear
from dsclip.model.config import ClipConfig
from dsclip.model.layer_major import Layer, over_chunks


class VisionEmbed(Layer):
    """Images [B, 3, S, S] -> tokens [B, 1 + K, W], class token first; [B, K, W] without one. R registers go before them.

    Registers are learned tokens without a position: blocks may keep there what concerns the whole image (Darcet et al. 2024,
    "Vision Transformers Need Registers"). Heads leave them out.

    With vision_pool attention there is a bias on patches and no norm, as in SigLIP; what the patches leave of an image at its
    right and lower edges isn't seen.

    uint8 images are normalised here, on the device; float images are taken as normalised.
    """

    def __init__(self, config: ClipConfig):
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        self.patch_size = patch
        self.mean, self.std = config.image_mean, config.image_std
        # A convolution whose stride is its kernel is a matrix product of patches; the weight keeps the Conv2d shape.
        attended = config.vision_pool == "attention"
        self.patch_embedding = PatchEmbedding(width, patch, bias=attended)
        self.class_embedding: nn.Parameter | None = None
        if config.class_tokens:
            self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.registers: nn.Parameter | None = None
        if config.vision_registers:
            self.registers = nn.Parameter(width**-0.5 * torch.randn(config.vision_registers, width))
        self.position_embedding = nn.Parameter(width**-0.5 * torch.randn(config.image_tokens, width))
        self.ln_pre = nn.Identity() if attended else nn.LayerNorm(width, eps=config.layer_norm_eps)

    @over_chunks
    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        mean, std = (per_channel(values, images.device) for values in (self.mean, self.std))
        return self.embedded(images, visible, mean, std)

    def embedded(self, images: Tensor, visible: Tensor | None, mean: Tensor, std: Tensor) -> Tensor:
        """`forward` with what it looks up, for compilers: all of it is tensors. mean, std [3, 1, 1]."""
        if images.dtype == torch.uint8:
            images = (images.float() / 255 - mean) / std
        patches = self._cut(images.to(self.position_embedding.dtype))
        positions = self.position_embedding if self.class_embedding is None else self.position_embedding[1:]
        if visible is None:
            positions = positions.expand(len(patches), -1, -1)
        else:
            patches = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))
            positions = look_up(positions, visible)
        tokens = self.patch_embedding(patches) + positions
        if self.class_embedding is not None:
            first = (self.class_embedding + self.position_embedding[0]).expand(len(tokens), 1, -1)
            tokens = torch.cat([first, tokens], dim=1)
        if self.registers is not None:
            tokens = torch.cat([self.registers.expand(len(tokens), -1, -1), tokens], dim=1)
        embedded: Tensor = self.ln_pre(tokens)
        return embedded

    def _cut(self, images: Tensor) -> Tensor:
        size, p = images.shape[-1], self.patch_size
        grid = size // p
        images = images[..., : grid * p, : grid * p]
        cut = images.reshape(-1, 3, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(len(images), grid * grid, 3 * p * p)


class PatchEmbedding(nn.Module):
    """The weight of a patch convolution [W, 3, p, p], applied to patches that are already cut out, [B, P, 3·p·p]."""

    def __init__(self, width: int, patch: int, *, bias: bool):
        super().__init__()
        # Conv2d's own default, U(±1/sqrt(fan-in)).
        bound = (3 * patch * patch) ** -0.5
        self.weight = nn.Parameter(torch.empty(width, 3, patch, patch).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.flatten(1), self.bias)


class VisionHead(Layer):
    """Tokens [B, T, W] -> unit embeddings [B, D] in float32, from the class token, or all tokens' average, or attention to them.

    Attention's output is the embedding, without a projection. The average is that of normalised tokens (Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k"), added up in
    float32 or wider. With `token_wise`, every token is embedded: [B, T, D]. Registers are left out before anything else.
    With `with_named`, what its named heads give stands behind the embeddings: [B, D + ΣK].
    """

    token_wise = with_named = False

    def __init__(self, config: ClipConfig):
        super().__init__()
        width = config.vision_width
        self.registers = config.vision_registers
        self.average = config.vision_pool == "average"
        self.ln_post = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.pool = AttentionPool(config) if config.vision_pool == "attention" else None
        projection = (
            nn.Identity
            if self.pool is not None
            else partial(Linear, width, config.embed_dim, std=width**-0.5, bias=False)
        )
        self.projection: nn.Module = projection()
        self.named: nn.Module | None = None

    @over_chunks
    def forward(self, tokens: Tensor) -> Tensor:
        pooled = self._pooled(tokens[:, self.registers :])
        embedded = unit_rows(self.projection(pooled))
        return beside(embedded, self.named, pooled) if self.with_named else embedded

    def _pooled(self, tokens: Tensor) -> Tensor:
        if not (self.token_wise or self.average or self.pool is not None):
            first: Tensor = self.ln_post(tokens[:, 0])
            return first
        normalised: Tensor = self.ln_post(tokens)
        if self.token_wise:
            return normalised
        if self.pool is not None:
            return self.pool(normalised)
        wide = torch.promote_types(normalised.dtype, torch.float32)
        return normalised.mean(dim=1, dtype=wide).to(normalised.dtype)


class TextEmbed(Layer):
    """Token ids [B, T] -> tokens [B, T, W]; T may be shorter than the context."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.token_embedding = nn.Parameter(torch.empty(config.vocab_size, config.text_width).normal_(std=0.02))
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, config.text_width).normal_(std=0.01))

    @over_chunks
    def forward(self, tokens: Tensor) -> Tensor:
        # A dense gradient costs the whole table for every chunk; `_LayerMajor` adds sparse ones up. CUDA's addition of
        # those isn't deterministic, and there the table is filled in no time.
        embedded = F.embedding(tokens, self.token_embedding, sparse=tokens.device.type == "cpu")
        return embedded + self.position_embedding[: tokens.shape[1]]


class TextHead(Layer):
    """Tokens [B, T, W] and end positions [B] -> unit embeddings [B, D] in float32, from the token that is pooled.

    With text_pool last the projection has a bias, as in SigLIP.
    With `token_wise`, every token is embedded and those behind the context's end are zero: [B, context, D].
    With `with_named`, what its named heads give stands behind the embeddings: [B, D + ΣK].
    """

    token_wise = with_named = False

    def __init__(self, config: ClipConfig):
        super().__init__()
        width = config.text_width
        self.context_length = config.context_length
        self.ln_final = nn.LayerNorm(width, eps=config.layer_norm_eps)
        biased = config.text_pool == "last"
        self.projection = Linear(width, config.embed_dim, std=width**-0.5, zero_bias=True, bias=biased)
        self.named: nn.Module | None = None

    @over_chunks
    def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:
        if self.token_wise:
            embedded = unit_rows(self.projection(self.ln_final(tokens)))
            return F.pad(embedded, (0, 0, 0, self.context_length - tokens.shape[1]))
        last = tokens.gather(1, ends[:, None, None].expand(-1, 1, tokens.shape[-1])).squeeze(1)
        pooled = self.ln_final(last)
        embedded = unit_rows(self.projection(pooled))
        return beside(embedded, self.named, pooled) if self.with_named else embedded


def beside(embedded: Tensor, named: nn.Module | None, pooled: Tensor) -> Tensor:
    """Embeddings [B, D], and behind them what named heads give of what was pooled [B, W]; embeddings alone without such heads."""
    return embedded if named is None else torch.cat([embedded, named(pooled)], dim=1)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Rows of table [R, W] by index [...], in its dtype, [..., W]; their gradients are added up in float32 or wider.

    table[index] adds them in bf16: with 512 samples that see half of 49 patches it was 1.5 % off, and this 0.17 %.
    """
    return F.embedding(index, table.to(torch.promote_types(table.dtype, torch.float32))).to(table.dtype)


@lru_cache(maxsize=64)
def per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """values as [3, 1, 1] in float32, copied to a device once: each copy from pageable memory would wait for it.

    Not a buffer: under `zero.Init`, in state dicts and on the meta device there is nothing to it.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)[:, None, None]


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to length one, in float32 or wider: bf16 embeddings would lose what the loss compares."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
