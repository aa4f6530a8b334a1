"""Transformer blocks of both towers.

Shapes: B samples of a chunk, T tokens, W width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsclip.model.attention import attention
from dsclip.model.fp8 import fp8_linear
from dsclip.model.layer_major import Layer, over_chunks, recomputed
from dsclip.model.low_rank import LowRank


def quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702x), the activation of OpenAI's weights."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # SigLIP's
}


class Linear(nn.Linear):
    """A linear layer that draws its weight in its own constructor: under `zero.Init` it is gone afterwards.

    layer_scale: where a factor for each output begins (Touvron et al. 2021, "Going deeper with Image Transformers", eq. 4); None:
    there is none. It multiplies the weight and the bias, which gives the same and leaves the product last: no checkpoint
    needs its result.

    `std` None keeps PyTorch's default weight; `zero_bias` keeps the default bias otherwise. fp8: how the product is
    computed, see `model/fp8.py`. lora: a low-rank product beside it, within the layer scale.
    """

    fp8 = False

    if TYPE_CHECKING:  # torch says Any of every module's call

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(
        self, inputs: int, outputs: int, *, std: float | None = None, zero_bias: bool = False, bias: bool = True,
        layer_scale: float | None = None,
    ):  # fmt: skip
        super().__init__(inputs, outputs, bias=bias)
        self.lora: LowRank | None = None
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((outputs,), layer_scale))
        if std is not None:
            nn.init.normal_(self.weight, std=std)
        if zero_bias and bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        beside = self._beside(x)  # first: what checkpoints run again ends before the last product
        weight, bias = self.scaled()
        product = fp8_linear(x, weight, bias) if self.fp8 else F.linear(x, weight, bias)
        return product if beside is None else product + beside

    def forward_again(self, x: Tensor) -> Tensor:
        """`forward` for the sake of its graph: the product with the weight is left out."""
        beside = self._beside(x)
        weight, bias = self.scaled()
        if self.fp8:
            product = fp8_linear(x, weight, bias, product_left_out=True)
        else:
            without_product: Callable[..., Tensor] = _ProductLeftOut.apply
            product = without_product(x, weight, bias)
        return product if beside is None else product + beside

    def _beside(self, x: Tensor) -> Tensor | None:
        """The adapter's part of the result, if there is one."""
        if self.lora is None:
            return None
        return self.lora(x) if self.gamma is None else self.gamma * self.lora(x)

    def scaled(self) -> tuple[Tensor, Tensor]:
        """The weight and the bias, times the layer scale."""
        if self.gamma is None:
            return self.weight, self.bias
        return self.gamma[:, None] * self.weight, self.gamma * self.bias


class XavierQkv(Linear):
    """Query, key and value of the image tower, drawn as torch's MultiheadAttention does (CLIP keeps that default)."""

    def __init__(self, width: int):
        super().__init__(width, 3 * width)
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Multi-head self-attention [B, T, W] -> [B, T, W].

    qk_norm: queries and keys of each head are normalised before their product (Dehghani et al. 2023, "Scaling Vision Transformers
    to 22 Billion Parameters", §2), with factors and offsets that all heads of the layer share, as OpenCLIP's.
    """

    if TYPE_CHECKING:  # torch says Any of every module's call

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(
        self, width: int, heads: int, *, causal: bool, text_layers: int | None, backend: str = "auto", eps: float = 1e-5,
        layer_scale: float | None = None, qk_norm: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.ln_q = nn.LayerNorm(width // heads, eps=eps) if qk_norm else None
        self.ln_k = nn.LayerNorm(width // heads, eps=eps) if qk_norm else None
        self.heads, self.causal, self.backend = heads, causal, backend
        if text_layers is None:
            self.qkv: Linear = XavierQkv(width)
            self.out = Linear(width, width, zero_bias=True, layer_scale=layer_scale)
        else:  # Radford et al. 2021, initialize_parameters: residual branches shrink with depth
            self.qkv = Linear(width, 3 * width, std=width**-0.5, zero_bias=True)
            std = width**-0.5 * (2 * text_layers) ** -0.5
            self.out = Linear(width, width, std=std, zero_bias=True, layer_scale=layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixed(x))

    def mixed(self, x: Tensor) -> Tensor:
        """The values that attention mixes, before the output projection, [B, T, W] -> [B, T, W]."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if self.ln_q is not None and self.ln_k is not None:
            q, k = self.ln_q(q), self.ln_k(k)
        mixed = attention(q, k, v, causal=self.causal, backend=self.backend)
        return mixed.transpose(1, 2).reshape(batch, tokens, width)


class Mlp(nn.Module):
    """Two linear layers with the activation between, [B, T, W] -> [B, T, W]."""

    if TYPE_CHECKING:  # torch says Any of every module's call

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(
        self, width: int, hidden: int, activation: str, *, text_layers: int | None, layer_scale: float | None = None
    ):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        std_in = None if text_layers is None else (2 * width) ** -0.5
        std_out = None if text_layers is None else width**-0.5 * (2 * text_layers) ** -0.5
        self.fc1 = Linear(width, hidden, std=std_in)
        self.fc2 = Linear(hidden, width, std=std_out, layer_scale=layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.fc1(x))

    def contract(self, hidden: Tensor) -> Tensor:
        """The activation and the second linear layer, [B, T, hidden] -> [B, T, W]."""
        return self.fc2(self.activation(hidden))

    def forward_again(self, x: Tensor) -> Tensor:
        """`forward` for the sake of its graph: its last product is left out, and its output is no number of use."""
        return self.fc2.forward_again(self.activation(self.fc1(x)))


class _ProductLeftOut(torch.autograd.Function):
    """x·Wᵀ + b of x [B, T, M] and W [W, M] in backward, and zero in forward: gradients don't depend on what it gave."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            (flat @ weight).view(x.shape) if for_x else None,
            flat.T @ x.reshape(len(flat), -1) if for_weight else None,
            flat.sum(dim=0) if for_bias else None,
        )


class Block(Layer):
    """A pre-norm residual block [B, T, W] -> [B, T, W].

    text_layers: the text tower's depth, None in the image tower. backend: of attention, see `model/attention.py`.
    fp8: of the four linear layers, see `model/fp8.py`. layer_scale: of both branches' last products, see `Linear`. qk_norm: see
    `Attention`. make_mlp: what the MLP is made by, of another kind in `model/experts.py`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        activation: str,
        eps: float,
        *,
        causal: bool,
        text_layers: int | None,
        backend: str = "auto",
        fp8: bool = False,
        layer_scale: float | None = None,
        qk_norm: bool = False,
        make_mlp: Callable[..., Any] = Mlp,
    ):
        super().__init__()
        norm = partial(nn.LayerNorm, width, eps=eps)
        self.ln_1 = norm()
        self.attn = Attention(
            width, heads, causal=causal, text_layers=text_layers, backend=backend, eps=eps, layer_scale=layer_scale,
            qk_norm=qk_norm,
        )  # fmt: skip
        self.ln_2 = norm()
        self.mlp: Mlp = make_mlp(width, mlp_width, activation, text_layers=text_layers, layer_scale=layer_scale)
        for module in self.modules():
            if isinstance(module, Linear):
                module.fp8 = fp8

    @over_chunks
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

    def forward_again(self, x: Tensor, *context: Tensor) -> Tensor:
        """`forward` for the sake of its graph, without the last product: two thirds of the products."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.forward_again(self.ln_2(x))

    # The same block cut into three pieces, for selective checkpointing.

    def _mix(self, x: Tensor) -> Tensor:
        return self.attn.mixed(self.ln_1(x))

    def _expand(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        middle = x + self.attn.out(mixed)
        return middle, self.mlp.fc1(self.ln_2(middle))

    def _contract(self, middle: Tensor, hidden: Tensor) -> Tensor:
        return middle + self.mlp.contract(hidden)

    def forward_selective(self, x: Tensor, *context: Tensor) -> Tensor:
        """Saves x, the attention's output, the middle of the block and the MLP's hidden layer: 7·W numbers a token.

        Backward runs query, key, value, attention and its output projection again: a third of the products. Compiled
        blocks keep what torch's partitioner chooses, see `model/compiled.py`.
        """
        mixed = recomputed(self._mix, x)
        return recomputed(self._contract, *recomputed(self._expand, x, mixed))
