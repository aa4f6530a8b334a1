"""The optimizer of the towers: which implementation steps."""

from __future__ import annotations

from typing import Any

import torch

from dsclip.config.schema import OptimSection
from dsclip.errors import UserError
from dsclip.model import Clip
from dsclip.optim.groups import parameter_groups


def adamw(model: Clip, ds_config: dict[str, Any], optim: OptimSection) -> torch.optim.Optimizer:
    """AdamW of torch, or DeepSpeed's for an optimizer that is offloaded to host memory. Raises UserError."""
    groups = parameter_groups(model, optim)
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    betas = (optim.beta1, optim.beta2)
    if offload.get("device", "none") == "none":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
    import deepspeed  # takes seconds

    try:
        cpu_adam: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
            groups, lr=optim.lr, betas=betas, eps=optim.eps, adamw_mode=True
        )
    except Exception as error:  # DeepSpeed compiles this optimizer on first use
        raise UserError(
            "offload_optimizer needs DeepSpeed's CPU Adam, which could not be compiled here "
            f"({type(error).__name__}: {error}). Install g++ and ninja, or use ds_configs/zero3_bf16.json."
        ) from error
    return cpu_adam
