"""AdamW."""

from __future__ import annotations

from typing import Any

import torch

from dsclip.config.schema import OptimSection


def adamw(groups: list[dict[str, Any]], optim: OptimSection) -> torch.optim.Optimizer:
    """torch's fused AdamW, also over parameters that ZeRO offloads to host memory (docs/decisions.md says why)."""
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
