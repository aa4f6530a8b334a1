"""The optimizer of the towers."""

from __future__ import annotations

import torch

from dsclip.config.schema import OptimSection
from dsclip.model import Clip
from dsclip.optim.groups import parameter_groups


def adamw(model: Clip, optim: OptimSection) -> torch.optim.Optimizer:
    """torch's fused AdamW, also over parameters that ZeRO offloads to host memory (docs/decisions.md says why)."""
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(parameter_groups(model, optim), lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
