"""Sums of the micro-batches' gradients in float32 where DeepSpeed would add them in bf16: when it reduces once a step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter


class GradientSums:
    """Takes each micro-batch's gradients out of `param.grad`, and puts their sum there, rounded once, with the last ones.

    While a reduction is coalesced DeepSpeed leaves the gradients in `param.grad`, in the weights' dtype, and torch adds
    the next ones to them. 4 bytes a parameter more on every rank. Gradients in float32 stay where they are.
    """

    def __init__(self, parameters: list[Parameter]):
        self._parameters = [p for p in parameters if p.requires_grad and p.dtype != torch.float32]
        self._sums: list[Tensor | None] = [None] * len(self._parameters)

    @torch.no_grad()
    def take(self) -> None:
        """After every backward but the last."""
        for index, p in enumerate(self._parameters):
            if p.grad is not None:
                total = self._sums[index]
                self._sums[index] = p.grad.float() if total is None else total.add_(p.grad)
                p.grad = None

    @torch.no_grad()
    def give(self) -> None:
        """After the last backward, which has left a gradient for every weight that had one before."""
        for index, p in enumerate(self._parameters):
            if (total := self._sums[index]) is not None:
                if p.grad is None:
                    raise RuntimeError("a weight had a gradient of an earlier micro-batch and has none of the last")
                # In place: under ZeRO-3 the weight may be released by now, and torch compares shapes when one assigns.
                p.grad.copy_(total.add_(p.grad))
                self._sums[index] = None
