"""Pooling by attention, as SigLIP's image tower ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsclip.model.attention import attention
from dsclip.model.blocks import Linear, Mlp, XavierQkv
from dsclip.model.config import ClipConfig


class AttentionPool(nn.Module):
    """One learned query attends to all tokens [B, T, W], and an MLP with a residual follows, [B, W].

    Zhai et al. 2022, "Scaling Vision Transformers": multi-head attention pooling.
    """

    if TYPE_CHECKING:  # torch says Any of every module's call

        def __call__(self, tokens: Tensor) -> Tensor: ...

    def __init__(self, config: ClipConfig):
        super().__init__()
        c, width = config, config.vision_width
        self.heads, self.backend = c.vision_heads, c.attention
        self.query_embedding = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, width)))
        self.qkv: Linear = XavierQkv(width)
        self.out = Linear(width, width, zero_bias=True)
        self.ln = nn.LayerNorm(width, eps=c.layer_norm_eps)
        self.mlp = Mlp(width, c.vision_mlp_width, c.activation, text_layers=None)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        parts = [width, 2 * width]
        (for_q, for_kv), (q_bias, kv_bias) = self.qkv.weight.split(parts), self.qkv.bias.split(parts)
        q = F.linear(self.query_embedding, for_q, q_bias).view(1, self.heads, 1, -1)
        q = q.expand(batch, -1, -1, -1).contiguous()  # GPU kernels take strides as they are, and an expanded one is 0
        k, v = F.linear(tokens, for_kv, kv_bias).view(batch, count, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        pooled = self.out(attention(q, k, v, causal=False, backend=self.backend).reshape(batch, width))
        return pooled + self.mlp(self.ln(pooled))
