"""Features whose first dimensions are features too (Kusupati et al. 2022, Matryoshka Representation Learning, eq. 1).

L = (L(I, T) + Σ_m c_m·L(I_m, T_m)) / (1 + Σ_m c_m), where I_m, T_m are the first m dimensions of every feature, scaled to
length one again. Any loss, with any negatives: hard negatives and queue are cut like the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsclip.config.schema import LossSection
from dsclip.errors import UserError
from dsclip.losses.group import ALONE, Group
from dsclip.losses.pairs import PLAIN, Loss, LossGrads, Negatives, Pairs
from dsclip.losses.registry import RegisteredLoss

FEATURES = ("image", "text", "hard_text", "queue_image", "queue_text")
SHORTEST = 1e-12  # tokens that don't exist are rows of zeros


def with_prefixes(loss: RegisteredLoss, settings: LossSection, width: int) -> RegisteredLoss:
    """The loss with the prefixes that the recipe asks for; the loss as it is without. width: of a feature.

    Raises UserError for prefixes that are none.
    """
    dims = settings.matryoshka_dims
    if not dims:
        return loss
    if dims != sorted(set(dims)) or dims[-1] >= width:
        raise UserError(
            f"loss.matryoshka_dims is {dims}; give ascending numbers below {width}, the width of a feature, which counts anyway"
        )
    weights = settings.matryoshka_weights or [1.0] * len(dims)
    return replace(loss, function=Matryoshka(loss.function, tuple(dims), tuple(weights)))


@dataclass(frozen=True)
class Matryoshka:
    """A loss over whole features and their prefixes. Accuracies and counts are those of the whole features."""

    function: Loss
    dims: tuple[int, ...]
    weights: tuple[float, ...]

    @torch.no_grad()
    def __call__(
        self, pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries: int | None = None
    ) -> LossGrads:
        def run(part: Pairs) -> LossGrads:
            return self.function(part, negatives=negatives, group=group, tile_entries=tile_entries)

        total, share = run(pairs), 1 / (1 + sum(self.weights))
        sums = {name: share * x for name in _GRADIENTS if (x := getattr(total, name)) is not None}
        for dim, weight in zip(self.dims, self.weights, strict=True):
            cut = {name: _Prefix(x, dim) for name in FEATURES if (x := getattr(pairs, name)) is not None}
            grads = run(replace(pairs, **{name: prefix.unit for name, prefix in cut.items()}))
            for name in sums:
                grad = getattr(grads, name)
                if name.removeprefix("d_") in FEATURES:
                    sums[name][..., :dim] += weight * share * cut[name.removeprefix("d_")].gradient(grad)
                else:
                    sums[name] += weight * share * grad
        return replace(total, **sums)


_GRADIENTS = ("loss", "d_image", "d_text", "d_hard_text", "d_log_scale", "d_bias")


class _Prefix:
    """unit [..., m]: the first m dimensions of features [..., D], scaled to length one in float32 or wider."""

    def __init__(self, features: Tensor, dim: int):
        first = features[..., :dim]
        wide = first.to(torch.promote_types(first.dtype, torch.float32))
        self._length = wide.norm(dim=-1, keepdim=True).clamp_min(SHORTEST)
        self._unit = wide / self._length
        self.unit = self._unit.to(features.dtype)

    def gradient(self, grad: Tensor) -> Tensor:
        """That of the dimensions before they were scaled: what points along the feature falls away."""
        along = (grad * self._unit).sum(dim=-1, keepdim=True)
        before: Tensor = (grad - along * self._unit) / self._length
        return before
