"""What dsclip's own optimizers share: a step over flat vectors, and Adam's moments."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsclip.config.schema import OptimSection
from dsclip.optim.flat import FlatVector

State = dict[str, Any]
Group = dict[str, Any]


class FlatOptimizer(torch.optim.Optimizer):
    """An optimizer of flat vectors that is told which tensors are in them.

    Its state is vectors as long as the parameters' and the count of steps, so that DeepSpeed saves and loads it as it does
    torch's. DeepSpeed calls `step` once a step, or once for each parameter group or part of one.
    """

    def __init__(self, groups: list[Group], optim: OptimSection):
        super().__init__(groups, {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps})
        self._vectors: dict[int, FlatVector] = {}

    def attach(self, vectors: list[FlatVector]) -> None:
        """To be called once, when DeepSpeed has made the vectors."""
        self._vectors = {id(v.numbers): v for v in vectors}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every vector that has a gradient. Collective for optimizers that look at whole tensors."""
        if closure is not None:
            raise NotImplementedError("DeepSpeed computes the gradients before the step")
        for group in self.param_groups:
            for numbers in group["params"]:
                if numbers.grad is not None:
                    state = self.state[numbers]
                    state["step"] = state.get("step", torch.zeros(())) + 1
                    self.update(self._vectors[id(numbers)], numbers.grad, state, group)

    @abstractmethod
    def update(self, vector: FlatVector, grad: Tensor, state: State, group: Group) -> None:
        """One step of a vector, in place. grad: as long as the vector; state["step"]: counts from 1."""

    def report(self) -> dict[str, Tensor]:
        """Numbers of the last step for people, on the device, the same on all ranks."""
        return {}


def adam_moments(numbers: Tensor, grad: Tensor, state: State, group: Group) -> tuple[Tensor, Tensor]:
    """Takes a gradient into Adam's moments; returns them corrected for their start at 0 (Kingma and Ba 2015, algorithm 1)."""
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(numbers), torch.zeros_like(numbers)
    beta1, beta2 = group["betas"]
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step = int(state["step"])
    return state["exp_avg"] / (1 - beta1**step), state["exp_avg_sq"] / (1 - beta2**step)
