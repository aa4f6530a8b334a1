"""Lion: the sign of an interpolated momentum (Chen et al. 2023, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsclip.optim.flat import FlatVector
from dsclip.optim.optimizer import FlatOptimizer, Group, State


class Lion(FlatOptimizer):
    """w ← w − lr·(sign(β₁·m + (1 − β₁)·g) + decay·w), then m ← β₂·m + (1 − β₂)·g. One number of state a parameter."""

    def update(self, vector: FlatVector, grad: Tensor, state: State, group: Group) -> None:
        """Number by number: no tensor boundary matters."""
        numbers = vector.numbers
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(numbers)
        beta1, beta2 = group["betas"]
        direction = state["exp_avg"].lerp(grad, 1 - beta1).sign_()
        numbers.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
        state["exp_avg"].lerp_(grad, 1 - beta2)
