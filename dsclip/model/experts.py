"""Blocks whose MLP is one of several for each token: a mixture of experts (Shazeer et al. 2017, Fedus et al. 2022).

No token is dropped and none waits for another: a token's experts depend on it alone, so chunks and micro-batches change nothing.
Experts are loaded evenly without a further loss, which would need the whole batch at once: by a balance in integers, which the
engine moves after a step (`engine/expert_balance.py`).

Shapes: B samples of a chunk, T tokens, W width, M hidden width, N experts, k of them for a token, S = B·T, R = k · tokens that are no padding.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsclip.model.blocks import Block, Mlp
from dsclip.model.layer_major import over_chunks, recomputed

BALANCE_STEP = 1e-3  # of a probability, by which an expert's balance moves (Wang et al. 2024, arXiv 2408.15664, §4.3)


class Routed(NamedTuple):
    """Tokens on their way through the experts. Each has k slots, sorted by expert; those of padding come last.

    hidden [R, M]: the experts' first products; gates [S, k]; place [S·k]: where each slot stands; sizes [N + 1]: slots of each
    expert, then of padding, in host memory.
    """

    hidden: Tensor
    gates: Tensor
    place: Tensor
    sizes: Tensor


def new_router(experts: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """[N, W] of logits that differ by about 0.1 for normalised tokens: nearly indifferent, so that gates begin near 1."""
    router: Tensor = 0.1 * width**-0.5 * torch.randn(experts, width, generator=generator)
    return router


class RoutedMlp(nn.Module):
    """N MLPs, k of them for each token, [B, T, W] -> [B, T, W]; zero for padding.

    p = softmax(router·x) in float32 or wider; the k experts with the largest p + balance are chosen, and add up to Σ (N/k)·p·expert(x).
    Switch's gate is p: times N/k the branch begins as large as that of one MLP, and with one expert it is that MLP. The router learns
    from p, also with k = 1. The balance chooses and has no gradient (Wang et al. 2024, eq. 3).
    """

    balance: Tensor  # int64 [N], in steps of BALANCE_STEP: engines cast what isn't an integer to bf16
    counted: Tensor | None = (
        None  # int64 [N], to which a forward adds the tokens of each expert; None: it doesn't count
    )

    if TYPE_CHECKING:  # torch says Any of every module's call

        def __call__(self, x: Tensor, ends: Tensor | None = None) -> Tensor: ...

    def __init__(
        self, width: int, hidden: int, activation: str, *, text_layers: int | None, layer_scale: float | None = None,
        experts: int, per_token: int,
    ):  # fmt: skip
        super().__init__()
        self.per_token = per_token
        self.router = nn.Parameter(new_router(experts, width))
        self.register_buffer("balance", torch.zeros(experts, dtype=torch.int64))
        self.experts = nn.ModuleList(
            Mlp(width, hidden, activation, text_layers=text_layers, layer_scale=layer_scale) for _ in range(experts)
        )

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        return self.contract(self.expand(x, ends)).view(x.shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens [S, W] the gates [S, k], in float32 or wider, and the chosen experts [S, k]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        shares = F.linear(x.to(wide), self.router.to(wide)).softmax(dim=1)
        chosen = (shares.detach() + BALANCE_STEP * self.balance).topk(self.per_token, dim=1).indices
        return shares.gather(1, chosen) * (len(self.experts) / self.per_token), chosen

    def expand(self, x: Tensor, ends: Tensor | None) -> Routed:
        """Chooses, sorts by expert and multiplies with the first weights. ends [B]: each caption's last token; None: all are tokens."""
        flat, k, experts = x.reshape(-1, x.shape[-1]), self.per_token, len(self.experts)
        gates, chosen = self.route(flat)
        if ends is not None:
            padding = torch.arange(x.shape[1], device=x.device) > ends[:, None]
            chosen = chosen.masked_fill(padding.view(-1, 1), experts)
        order = chosen.flatten().argsort(stable=True)
        loads = (chosen.view(-1, 1) == torch.arange(experts + 1, device=x.device)).sum(dim=0)
        if self.counted is not None:
            self.counted += loads[:experts]
        sizes = loads.cpu()  # products need their shapes: a GPU is waited for
        slots = flat if k == 1 else flat[:, None].expand(-1, k, -1).reshape(-1, flat.shape[1])
        rows = slots.index_select(0, order[: len(order) - int(sizes[-1])])
        # Also of an expert without a token: its weights have a gradient then, of zeros.
        hidden = [e.fc1(part) for e, part in zip(self._mlps(), rows.split(sizes[:-1].tolist()), strict=True)]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        return Routed(torch.cat(hidden), gates, place, sizes)

    def contract(self, routed: Routed) -> Tensor:
        """The activations, the second products and the sum over a token's experts, [S, W]."""
        hidden, gates, place, sizes = routed
        parts = zip(self._mlps(), hidden.split(sizes[:-1].tolist()), strict=True)
        outputs = [expert.contract(part) for expert, part in parts]
        of_padding = hidden.new_zeros(int(sizes[-1]), outputs[0].shape[1])
        # Each slot is read once: neither this nor its gradient depends on an order of additions.
        slots = torch.cat([*outputs, of_padding]).index_select(0, place)
        weighted = gates.to(slots.dtype)[..., None] * slots.view(*gates.shape, -1)
        return weighted.sum(dim=1)

    def _mlps(self) -> list[Mlp]:
        return [expert for expert in self.experts if isinstance(expert, Mlp)]


class RoutedBlock(Block):
    """A block [B, T, W] -> [B, T, W] with a `RoutedMlp`. ends [B]: each sample's last token, behind which is padding; None: none is."""

    mlp: RoutedMlp  # type: ignore[assignment]

    def __init__(
        self, width: int, heads: int, mlp_width: int, activation: str, eps: float, *, experts: int, per_token: int,
        causal: bool, text_layers: int | None, backend: str = "auto", layer_scale: float | None = None, qk_norm: bool = False,
    ):  # fmt: skip
        super().__init__(
            width, heads, mlp_width, activation, eps, causal=causal, text_layers=text_layers, backend=backend,
            layer_scale=layer_scale, qk_norm=qk_norm, make_mlp=partial(RoutedMlp, experts=experts, per_token=per_token),
        )  # fmt: skip

    @over_chunks
    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x), ends)

    def forward_again(self, x: Tensor, *context: Tensor) -> Tensor:
        """All of `forward`: the router's gradient needs the last products."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x), *context)

    def _expanded(self, x: Tensor, mixed: Tensor, *context: Tensor) -> tuple[Tensor, Routed]:
        middle = x + self.attn.out(mixed)
        return middle, self.mlp.expand(self.ln_2(middle), *context or (None,))

    def _contracted(self, middle: Tensor, hidden: Tensor, gates: Tensor, place: Tensor, sizes: Tensor) -> Tensor:
        return middle + self.mlp.contract(Routed(hidden, gates, place, sizes)).view(middle.shape)

    def forward_selective(self, x: Tensor, *context: Tensor) -> Tensor:
        """Saves what `Block.forward_selective` does, with a hidden layer for each of a token's experts; their last products run again."""
        mixed = recomputed(self._mix, x)
        middle, routed = recomputed(self._expanded, x, mixed, *context)
        return recomputed(self._contracted, middle, *routed)
