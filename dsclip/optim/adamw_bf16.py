"""AdamW whose moments are kept in bf16: 4 bytes a parameter instead of 8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsclip.optim.flat import FlatVector
from dsclip.optim.optimizer import FlatOptimizer, Group, State

SLICE = 1 << 24  # numbers that are in float32 at a time
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamWBf16(FlatOptimizer):
    """AdamW in float32, of moments that are rounded to bf16 between steps, up or down by chance.

    Rounded to the nearest, a second moment would stand still: with β₂ = 0.999 it moves by less than half of a bf16 step of
    1/256. By chance it is right on average. The noise is a function of step, vector and rank, so a resumed run repeats it.
    """

    def update(self, vector: FlatVector, grad: Tensor, state: State, group: Group) -> None:
        """Number by number: no tensor boundary matters."""
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(vector.numbers, dtype=torch.bfloat16)
        beta1, beta2 = group["betas"]
        lr, step = group["lr"], int(state["step"])
        noise = torch.Generator(vector.numbers.device).manual_seed(self._seed(vector, step))
        parts = (x.split(SLICE) for x in (vector.numbers, grad, *(state[name] for name in MOMENTS)))
        for numbers, g, first, second in zip(*parts, strict=True):
            m = first.float().lerp_(g, 1 - beta1)
            v = second.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
            first.copy_(by_chance(m, noise))
            second.copy_(by_chance(v, noise))
            root = v.div_(1 - beta2**step).sqrt_().add_(group["eps"])
            numbers.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, root, value=-lr / (1 - beta1**step))

    def _seed(self, vector: FlatVector, step: int) -> int:
        number = list(self._vectors).index(id(vector.numbers))
        return (step * len(self._vectors) + number) * vector.group.world_size + vector.group.rank

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch widens moments to the parameters' float32, and they are narrowed again, which loses nothing."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in MOMENTS:
                state[name] = state[name].bfloat16()


def by_chance(x: Tensor, noise: torch.Generator) -> Tensor:
    """Finite float32 x as bf16, rounded up with the probability that makes the expectation x."""
    bits = torch.empty(x.shape, dtype=torch.int32, device=x.device).random_(0, 1 << 16, generator=noise)
    return bits.add_(x.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()
