"""Low-rank adapters of linear layers (LoRA, Hu et al. 2021): W stays, and s·B·A beside it is trained.

Shapes: r rank, K inputs, N outputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOWN, UP = ".lora.down", ".lora.up"  # what follows a layer's name in those of its adapter's parameters


class LowRank(nn.Module):
    """x [..., K] -> s·B·A·x [..., N] with A [r, K] (`down`) and B [N, r] (`up`), in x's dtype.

    B begins with zeros, so that the layer begins as it was; A as PyTorch begins linear layers, as LoRA's own code does.
    """

    if TYPE_CHECKING:  # torch says Any of every module's call

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.down), self.up)


class MergedWeights(Mapping[str, Tensor]):
    """The weights of a model with adapters as those of the plain model: W + s·B·A, made when it is asked for.

    weights: by name, with the adapters'; a model without any is given back as it is.
    """

    def __init__(self, weights: Mapping[str, Tensor], scale: float):
        self._weights, self._scale = weights, scale
        self._names = [name for name in weights if not name.endswith((DOWN, UP))]

    def __getitem__(self, name: str) -> Tensor:
        weight, layer = self._weights[name], name.removesuffix(".weight")
        if layer == name or layer + DOWN not in self._weights:
            return weight
        return weight + self._scale * (self._weights[layer + UP] @ self._weights[layer + DOWN])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
