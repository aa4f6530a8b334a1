"""Weights that are numbers: a model with NaN in it computes nothing, and some metrics would call that perfect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from dsclip.convert.weights import Named
from dsclip.errors import UserError


def finite(weights: Named, path: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights, as they come. Raises UserError that names the first with a value that isn't finite; path: where it was read."""
    for name, tensor in weights:
        if tensor.is_floating_point() and tensor.numel() and not all(x.isfinite() for x in tensor.aminmax()):
            count = int((~tensor.isfinite()).sum())
            raise UserError(
                f"{path}: {count} of the {tensor.numel()} values of {name} are not finite; the model diverged, or was stored "
                "in a dtype that is too narrow for it. Use other weights."
            )
        yield name, tensor


def finite_scale(scale: float, path: Path) -> float:
    """The logit scale, as a factor. Raises UserError when it isn't a positive finite number."""
    if not (math.isfinite(scale) and scale > 0):
        raise UserError(
            f"{path}: the logit scale is {scale}, no finite positive factor; the model diverged. Use other weights."
        )
    return scale
