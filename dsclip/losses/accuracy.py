"""In-batch accuracy, gathered tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from dsclip.losses.masks import Masks


class InBatchAccuracy:
    """How many of n queries have no candidate of the batch above their own partner.

    The partner's logit is taken from the tile in which it stands: computed elsewhere it may round to another number,
    and a winner would lose against itself.
    """

    def __init__(self, n: int, like: Tensor):
        self._best = like.new_full((n,), -torch.inf)
        self._partner = like.new_full((n,), -torch.inf)

    def update(self, part: slice, logits_rc: Tensor, masks: Masks, best: Tensor, *, candidate_dim: int) -> None:
        """A tile of candidates in the batch; part: the queries in it; best: the largest logit of each."""
        self._best[part] = torch.maximum(self._best[part], best)
        if masks.diagonal is not None:
            partner = logits_rc.diagonal(masks.diagonal)
            first = part.start + max(0, masks.diagonal if candidate_dim == 0 else -masks.diagonal)
            self._partner[first : first + len(partner)] = partner

    def correct(self) -> Tensor:
        """The number of queries, int64 []."""
        return (self._partner >= self._best).sum()
