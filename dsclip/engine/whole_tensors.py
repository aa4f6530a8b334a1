"""Whole weights and gradients of an engine, whatever its ZeRO stage, for those who compare them."""

from __future__ import annotations

from torch import Tensor

from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.quiet_deepspeed import deepspeed


def whole_weights(engine: ContrastiveEngine) -> dict[str, Tensor]:
    """The fp32 weights by parameter name. Collective."""
    get = deepspeed.utils.safe_get_full_fp32_param
    return {name: get(p).clone() for name, p in engine.module.named_parameters()}


def whole_gradients(engine: ContrastiveEngine) -> dict[str, Tensor]:
    """The gradients that wait for the optimizer's step, by parameter name. Collective."""
    get = deepspeed.utils.safe_get_full_grad
    return {name: get(p).clone() for name, p in engine.module.named_parameters()}
