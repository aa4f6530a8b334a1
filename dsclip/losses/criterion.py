"""What a criterion is: it turns the logits of a tile into the loss of each query and the gradient for the logits."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from dsclip.losses.accuracy import InBatchAccuracy
from dsclip.losses.masks import Masks
from dsclip.losses.samples import Samples


class QueryLosses(NamedTuple):
    """loss [r] of each query; statistics: what its gradient needs of all its candidates, one tensor [r] a name.

    d_bias []: the gradient of the sum of these losses for the logit bias, of criteria that have one. d_log_scale []: that
    for log s beside what goes through the logits, of criteria in which s stands elsewhere too.
    """

    loss: Tensor
    statistics: dict[str, Tensor]
    d_bias: Tensor | None = None
    d_log_scale: Tensor | None = None


class Statistics(Protocol):
    """What queries need of all their candidates, updated tile by tile."""

    accuracy: InBatchAccuracy

    def update(self, part: slice, logits_rc: Tensor, masks: Masks, *, candidate_dim: int, in_batch: bool) -> None:
        """Takes in one tile; part: the queries in it. in_batch: its candidates are pairs of the global batch."""

    def finish(self, scale: Tensor) -> QueryLosses:
        """After the last tile. scale []: s."""


class Criterion(Protocol):
    """Made anew for each evaluation of a loss: `Criterion(negatives, bias, scratch)`.

    both_directions: texts are queries too, and the loss is the mean of both; otherwise every entry of the batch is
    counted once, by its image. has_bias: it learns a logit bias.
    """

    both_directions: bool
    has_bias: bool

    def statistics(self, queries: Samples, *, are_images: bool) -> Statistics:
        """Empty statistics of these queries."""

    def weights(self, logits_rc: Tensor, masks: Masks, queries: Samples, *, candidate_dim: int, reuse: bool) -> Tensor:
        """The gradient [r, c] of the queries' summed losses for the logits. With `reuse` it may take their memory."""

    def pair_weights(
        self, logits_rc: Tensor, row_masks: Masks, col_masks: Masks, rows: Samples, cols: Samples
    ) -> Tensor | None:
        """The weights [r, c] of both directions in one pass over the tile; None where there is no such way."""
