"""StableAdamW: AdamW that takes a shorter step where the second moment lags behind (Wortsman et al. 2023, algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsclip.config.schema import OptimSection
from dsclip.optim.flat import FlatVector
from dsclip.optim.optimizer import FlatOptimizer, Group, State, adam_moments


class StableAdamW(FlatOptimizer):
    """AdamW with η = lr / max(1, RMS) for each tensor, RMS² the mean of g²/max(v̂, ε²): Adafactor's update clipping.

    RMS is near 1 while gradients are as large as they have been, and above before a loss spike.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: OptimSection):
        super().__init__(groups, optim)
        self._rms: dict[int, Tensor] = {}

    def update(self, vector: FlatVector, grad: Tensor, state: State, group: Group) -> None:
        """Collective: one all-reduce of a sum a tensor."""
        numbers = vector.numbers
        first, second = adam_moments(numbers, grad, state, group)
        root = second.sqrt_()
        (squares,) = vector.squares(grad / root.clamp(min=group["eps"]))
        rms = (squares / vector.sizes).sqrt()
        self._rms[id(numbers)] = rms
        rate = vector.spread(group["lr"] / rms.clamp(min=1))
        step = first.div_(root.add_(group["eps"])).add_(numbers, alpha=group["weight_decay"])
        numbers.sub_(step.mul_(rate))

    def report(self) -> dict[str, Tensor]:
        """update_rms: the largest RMS of a tensor; clipped_tensors: how many were above 1."""
        if not self._rms:
            return {}
        rms = torch.cat(list(self._rms.values()))
        return {"update_rms": rms.max(), "clipped_tensors": (rms > 1).sum()}
