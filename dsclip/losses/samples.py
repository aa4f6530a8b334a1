"""Samples as queries or candidates of a similarity: features with what masks and gradients must know of each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """r samples. features [r, D], or tokens [r, T, D] with valid [r, T].

    first: index of the first sample in the global batch; None for samples that are no part of it (queue, hard
    negatives). key [r]. owner [r]: hard negatives only, the global index of the image they belong to. positive_logit
    [r]: the logit of the sample with its partner. statistics: what the gradient of its own loss needs, when it is a
    query, one tensor [r] a name. is_bf16: the features are numbers of bf16, in whatever dtype.
    """

    features: Tensor
    valid: Tensor | None = None
    first: int | None = None
    key: Tensor | None = None
    owner: Tensor | None = None
    positive_logit: Tensor | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)
    is_bf16: bool = False

    def __len__(self) -> int:
        return len(self.features)

    def part(self, start: int, stop: int) -> Samples:
        """Samples start to stop."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[start:stop]

        return Samples(
            self.features[start:stop],
            cut(self.valid),
            None if self.first is None else self.first + start,
            cut(self.key),
            cut(self.owner),
            cut(self.positive_logit),
            {name: x[start:stop] for name, x in self.statistics.items()},
            self.is_bf16,
        )

    def with_statistics(self, statistics: dict[str, Tensor]) -> Samples:
        """The same samples, of which the gradient as queries can be computed."""
        return replace(self, statistics=statistics)


def widen(x: Tensor) -> Tensor:
    """Features in float32 or wider: half-precision ones travel as they are and are computed with in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
