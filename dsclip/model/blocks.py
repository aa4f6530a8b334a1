"""Transformer blocks of both towers.

Shapes: B samples of a chunk, T tokens, W width, H heads.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsclip.model.layer_major import Stage, kept_inputs_only


def quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702x), the activation of OpenAI's weights."""
    return x * torch.sigmoid(1.702 * x)


CPU_PLAIN_TOKENS = 256
ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class Linear(nn.Linear):
    """A linear layer that draws its weight in its own constructor: under `zero.Init` it is gone afterwards.

    `std` None keeps PyTorch's default weight; `zero_bias` keeps the default bias otherwise.
    """

    def __init__(self, inputs: int, outputs: int, *, std: float | None = None, zero_bias=False, bias=True):
        super().__init__(inputs, outputs, bias=bias)
        if std is not None:
            nn.init.normal_(self.weight, std=std)
        if zero_bias and bias:
            nn.init.zeros_(self.bias)


class XavierQkv(nn.Linear):
    """Query, key and value of the image tower, drawn as torch's MultiheadAttention does (CLIP keeps that default)."""

    def __init__(self, width: int):
        super().__init__(width, 3 * width)
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention of q, k, v [B, H, T, W/H].

    On a CPU torch's fused kernel takes five times as long as three plain products for CLIP's short sequences (forward
    and backward in bf16, 64 × 12 heads × 50 tokens: 52 ms against 10 ms); for long ones its memory counts.
    """
    tokens = q.shape[2]
    if q.device.type != "cpu" or tokens > CPU_PLAIN_TOKENS:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    if causal:
        scores = scores + scores.new_full((tokens, tokens), -torch.inf).triu(1)
    return scores.softmax(dim=3) @ v


class Attention(nn.Module):
    """Multi-head self-attention [B, T, W] -> [B, T, W]."""

    def __init__(self, width: int, heads: int, *, causal: bool, text_layers: int | None):
        super().__init__()
        self.heads, self.causal = heads, causal
        if text_layers is None:
            self.qkv = XavierQkv(width)
            self.out = Linear(width, width, zero_bias=True)
        else:  # Radford et al. 2021, initialize_parameters: residual branches shrink with depth
            self.qkv = Linear(width, 3 * width, std=width**-0.5, zero_bias=True)
            self.out = Linear(width, width, std=width**-0.5 * (2 * text_layers) ** -0.5, zero_bias=True)

    def mixed(self, x: Tensor) -> Tensor:
        """Everything but the last product, [B, T, W] -> [B, T, W]."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return attention(q, k, v, causal=self.causal).transpose(1, 2).reshape(batch, tokens, width)


class Mlp(nn.Module):
    """Two linear layers with the activation between, [B, T, W] -> [B, T, W]."""

    def __init__(self, width: int, hidden: int, activation: str, *, text_layers: int | None):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        std_in = None if text_layers is None else (2 * width) ** -0.5
        std_out = None if text_layers is None else width**-0.5 * (2 * text_layers) ** -0.5
        self.fc1 = Linear(width, hidden, std=std_in)
        self.fc2 = Linear(hidden, width, std=std_out)

    def contract(self, hidden: Tensor) -> Tensor:
        """The activation and the second layer, [B, T, hidden] -> [B, T, W]."""
        return self.fc2(self.activation(hidden))


def compile_blocks(model: nn.Module) -> None:
    """torch.compile of the code inside the blocks. Across ZeRO-3's hooks it would not work; within a leaf it does."""
    for module in model.modules():
        if isinstance(module, Block):
            for name in ("_mix", "_expand", "_contract"):
                setattr(module, name, torch.compile(getattr(module, name)))


class Block(Stage):
    """A pre-norm residual block; `text_layers` is the text tower's depth, or None in the image tower."""

    def __init__(self, width, heads, mlp_width, activation, eps, *, causal: bool, text_layers: int | None):
        super().__init__()
        norm = partial(nn.LayerNorm, width, eps=eps)
        self.ln_1 = norm()
        self.attn = Attention(width, heads, causal=causal, text_layers=text_layers)
        self.ln_2 = norm()
        self.mlp = Mlp(width, mlp_width, activation, text_layers=text_layers)

    def compute(self, x: Tensor) -> Tensor:
        return self._contract(*self._expand(x, self._mix(x)))

    def compute_keeping(self, x: Tensor) -> Tensor:
        """Keeps x, the attention's output, the middle of the block and the MLP's hidden layer: 7·W numbers a token.

        Backward runs query, key, value, attention and its output projection again: a third of the products.
        """
        mixed = kept_inputs_only(self._mix, x)
        return kept_inputs_only(self._contract, *kept_inputs_only(self._expand, x, mixed))

    def _mix(self, x: Tensor) -> Tensor:
        return self.attn.mixed(self.ln_1(x))

    def _expand(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        middle = x + self.attn.out(mixed)
        return middle, self.mlp.fc1(self.ln_2(middle))

    def _contract(self, middle: Tensor, hidden: Tensor) -> Tensor:
        return middle + self.mlp.contract(hidden)
