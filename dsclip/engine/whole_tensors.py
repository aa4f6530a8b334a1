"""Whole weights and gradients of an engine, whatever its ZeRO stage, for those who compare them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Parameter

from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.quiet_deepspeed import deepspeed


def whole_weights(engine: ContrastiveEngine) -> dict[str, Tensor]:
    """The fp32 weights by name; frozen ones, of which there are no others, widened from their dtype; buffers. Collective."""
    get = deepspeed.utils.safe_get_full_fp32_param
    weights = {n: get(p).clone() if p.requires_grad else _frozen(p) for n, p in engine.module.named_parameters()}
    return weights | {n: buffer.clone() for n, buffer in engine.module.named_buffers()}


def _frozen(parameter: Parameter) -> Tensor:
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach().float().clone()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().float().clone()


def whole_gradients(engine: ContrastiveEngine) -> dict[str, Tensor]:
    """The gradients that wait for the optimizer's step, by the names of the parameters that are trained. Collective."""
    get = deepspeed.utils.safe_get_full_grad
    return {name: get(p).clone() for name, p in engine.module.named_parameters() if p.requires_grad}
