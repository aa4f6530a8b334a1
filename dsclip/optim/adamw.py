"""The optimizer of the towers: which parameters decay, and which implementation steps."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from dsclip.config.schema import OptimSection
from dsclip.errors import UserError
from dsclip.model import Clip


def adamw(model: Clip, ds_config: dict[str, Any], optim: OptimSection) -> torch.optim.Optimizer:
    """AdamW of torch, or DeepSpeed's for an optimizer that is offloaded to host memory. Raises UserError."""
    groups = decay_groups(model, optim.weight_decay)
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


def decay_groups(model: Clip, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and embeddings of positions, class, query and registers don't (OpenCLIP's rule). Frozen ones are left out."""
    decayed: list[Parameter] = []
    free: list[Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under zero.Init the tensor itself is empty
        embedding = name.endswith(("position_embedding", "class_embedding", "query_embedding", "registers"))
        (free if len(shape) < 2 or embedding else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
