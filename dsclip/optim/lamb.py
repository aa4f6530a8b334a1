"""LAMB: Adam's update of a tensor, as long as the tensor itself (You et al. 2020, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsclip.optim.flat import FlatVector
from dsclip.optim.optimizer import FlatOptimizer, Group, State, adam_moments


class Lamb(FlatOptimizer):
    """w ← w − lr·(‖w‖/‖u‖)·u with u = m̂/(√v̂ + ε) + decay·w, norms of whole tensors; φ is the identity.

    Tensors without decay (biases, norms) take u itself, as in the authors' experiments; so do those of which w or u is 0.
    """

    def update(self, vector: FlatVector, grad: Tensor, state: State, group: Group) -> None:
        """Collective where tensors decay: one all-reduce of two sums a tensor."""
        numbers = vector.numbers
        first, second = adam_moments(numbers, grad, state, group)
        step = first.div_(second.sqrt_().add_(group["eps"])).add_(numbers, alpha=group["weight_decay"])
        if group["weight_decay"]:
            weights, steps = vector.squares(numbers, step)
            ratio = torch.where((weights > 0) & (steps > 0), (weights / steps).sqrt(), 1.0)
            step.mul_(vector.spread(ratio))
        numbers.sub_(step, alpha=group["lr"])
