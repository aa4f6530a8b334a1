"""A dense text tower as one with experts: each begins as the MLP that was there (Komatsuzaki et al. 2022, "Sparse Upcycling")."""

from __future__ import annotations

import torch
from torch import Tensor

from dsclip.model import ClipConfig
from dsclip.model.experts import new_router


def upcycled(weights: dict[str, Tensor], config: ClipConfig) -> dict[str, Tensor]:
    """The weights with every dense MLP of a block that `config` routes copied to its experts; as they are where there is none.

    Routers are drawn, the same in every run. They begin nearly indifferent, so that the tower begins near the dense one.
    """
    found, generator = dict(weights), torch.Generator().manual_seed(0)
    for block in filter(config.routed, range(config.text_layers)):
        mlp = f"text.blocks.{block}.mlp"
        parts = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc2.gamma")
        dense = {part: found.pop(f"{mlp}.{part}") for part in parts if f"{mlp}.{part}" in found}
        if not dense:
            continue
        for expert in range(config.text_experts):
            found |= {f"{mlp}.experts.{expert}.{part}": tensor.clone() for part, tensor in dense.items()}
        found[f"{mlp}.router"] = new_router(config.text_experts, config.text_width, generator)
        found[f"{mlp}.balance"] = torch.zeros(config.text_experts)
    return found
