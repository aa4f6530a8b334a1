"""In-batch accuracy, gathered tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from dsclip.losses.masks import Masks


class InBatchAccuracy:
    """How many of n askers have no candidate of the batch above their own partner.

    The own logit is taken from the tile in which it stands: computed elsewhere it may round to another number, and a
    winner would lose against itself.
    """

    def __init__(self, n: int, like: Tensor):
        self._best = like.new_full((n,), -torch.inf)
        self._own = like.new_full((n,), -torch.inf)

    def add(self, part: slice, logits: Tensor, masks: Masks, best: Tensor, *, cols_ask: bool) -> None:
        """A tile [r, c] of candidates in the batch; best: its largest logit for each asker."""
        self._best[part] = torch.maximum(self._best[part], best)
        if masks.diagonal is not None:
            own = logits.diagonal(masks.diagonal)
            first = part.start + max(0, masks.diagonal if cols_ask else -masks.diagonal)
            self._own[first : first + len(own)] = own

    def correct(self) -> Tensor:
        """The number of askers, int64 []."""
        return (self._own >= self._best).sum()
