"""Numbers that are not finite: one decision a step, the same on all ranks, without a collective of its own.

DeepSpeed skips a step whose gradient norm isn't finite, in every ZeRO stage, and the norm is that of all ranks. So what
DeepSpeed doesn't see (the loss, the gradients of the temperature and the bias) is made part of it: it multiplies the
gradient of the features by one, or by NaN.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dsclip.distributed import Collectives
from dsclip.errors import UserError
from dsclip.losses import LossGrads


def one_if_finite(grads: LossGrads) -> Tensor:
    """1.0, or NaN when the loss or a scalar's gradient isn't finite; float32 [] that was not read by the host."""
    usable = _usable(grads)
    return usable.new_full((), torch.nan, dtype=torch.float32).masked_fill(usable.all(), 1.0)


def skip_reason(features: Iterable[Tensor], grads: LossGrads, group: Collectives) -> str:
    """What was not finite in a step that was skipped: the first cause in the order of computation. Collective.

    features: of images, captions and further views.
    """
    seen = torch.stack([torch.stack([_finite(x) for x in features]).all(), *_usable(grads)])
    ranks = group.all_reduce_sum((~seen).int()).tolist()
    for name, count in zip(("features", "loss", "d_log_scale", "d_bias"), ranks, strict=False):
        if count:
            return f"{name} on {count} of {group.world_size} ranks"
    return "gradients"


def finite_or(x: Tensor, instead: Tensor) -> Tensor:
    """The samples of x [n, ...] that are finite, and those of `instead` in place of the others, without a read."""
    finite = x.isfinite().flatten(1).all(dim=1)
    return torch.where(finite.view(-1, *[1] * (x.dim() - 1)), x, instead.to(x.dtype))


def check_weights(weights: Iterable[Tensor], group: Collectives, device: torch.device, step: int) -> None:
    """Raises UserError, on every rank, when a rank's share of the weights isn't finite. Collective.

    No gradient does that, but an update can: with optim.lr · optim.weight_decay above 2 the decay alone grows the weights.
    """
    shards = [getattr(p, "ds_tensor", p).detach() for p in weights]  # under ZeRO-3 the parameter itself is empty
    broken = torch.tensor(sum(not _finite(shard) for shard in shards), device=device)  # an offloaded shard is elsewhere
    if group.all_reduce_sum(broken).item():
        raise UserError(
            f"step {step}: the weights are no longer finite, and no checkpoint was written of them. Lower optim.lr and go on "
            "from the last checkpoint (--resume auto), or start again"
        )


def _usable(grads: LossGrads) -> Tensor:
    """[2 or 3] bool: the loss is finite; so are d_log_scale and d_bias, and their squares, which Adam keeps."""
    scalars = [x.float().square() for x in (grads.d_log_scale, grads.d_bias) if x is not None]
    return torch.stack([grads.loss.float(), *scalars]).isfinite()


def _finite(x: Tensor) -> Tensor:
    """bool []. Both ends are NaN when a number is; and unlike `isfinite` they make no tensor as large, for a thirtieth of the time on a CPU."""
    return torch.stack(torch.aminmax(x)).isfinite().all() if x.numel() else x.new_ones((), dtype=torch.bool)
