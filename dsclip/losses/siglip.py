"""SigLIP's pairwise sigmoid (Zhai et al. 2023, algorithm 1), with the same negatives as the softmax.

loss = −(1/N) Σ_ij w_ij·[y_ij·log σ(S_ij + b) + (1 − y_ij)·log σ(−S_ij − b)]; an entry is counted once, by its image as
the query. Texts are queries of the queue's images alone. Label smoothing: y becomes (1 − ε)·y + ε/2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsclip.errors import UserError
from dsclip.losses.accuracy import InBatchAccuracy
from dsclip.losses.criterion import QueryLosses
from dsclip.losses.group import ALONE, Group
from dsclip.losses.masks import Masks, positives
from dsclip.losses.pairs import PLAIN, LossGrads, Negatives, Pairs
from dsclip.losses.samples import Samples
from dsclip.losses.similarity import Cosine
from dsclip.losses.tile_size import Scratch
from dsclip.losses.tiled import tiled_loss


def sigmoid(
    pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries: int | None = None
) -> LossGrads:
    """−(1/N) Σ_ij log σ(z_ij(S_ij + b)), z = 1 for pairs and −1 otherwise. Raises UserError without a bias."""
    return tiled_loss(
        pairs, similarity=Cosine, criterion=Sigmoid, negatives=negatives, group=group, tile_entries=tile_entries
    )


class Sigmoid:
    """The criterion of SigLIP."""

    both_directions = False
    has_bias = True

    def __init__(self, negatives: Negatives, bias: Tensor | None, scratch: Scratch):
        if bias is None:
            raise UserError("the sigmoid loss needs a bias, and Pairs.bias is None")
        if negatives.debiased:
            raise UserError(
                f"debiased={negatives.debiased} corrects a softmax, and the sigmoid loss has none; set it to 0"
            )
        self.negatives, self._bias = negatives, bias

    def statistics(self, queries: Samples, *, are_images: bool) -> SigmoidStatistics:
        """Empty statistics of these queries. Texts leave the entries of the batch to the images."""
        return SigmoidStatistics(queries, self.negatives, self._bias, counts_batch=are_images)

    def pair_weights(self, logits_rc: Tensor, row_masks: Masks, col_masks: Masks, rows: Samples, cols: Samples) -> None:
        """An entry has a query in one direction only: nothing to put together."""

    def weights(self, logits_rc: Tensor, masks: Masks, queries: Samples, *, candidate_dim: int, reuse: bool) -> Tensor:
        """The gradient [r, c] of Σ_i loss_i for the logits."""
        shift = queries.statistics["shift"].unsqueeze(candidate_dim) if self.negatives.beta else None
        target_rc, weight_rc = _target_and_weight(logits_rc, masks, self.negatives, shift)
        weights_rc = torch.sigmoid(logits_rc + self._bias).sub_(target_rc)
        return weights_rc if weight_rc is None else weights_rc.mul_(weight_rc)


def _target_and_weight(
    logits_rc: Tensor, masks: Masks, negatives: Negatives, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The target y [r, c], and the weight w [r, c] of each entry, None where all are 1."""
    positive = positives(masks, logits_rc)
    target = positive.to(logits_rc.dtype)
    if negatives.label_smoothing:
        target = target * (1 - negatives.label_smoothing) + negatives.label_smoothing / 2
    weight = None
    if shift is not None:
        weight = torch.where(positive, 1.0, (negatives.beta * logits_rc - shift).exp())
    if masks.excluded is not None:
        weight = (~masks.excluded).to(logits_rc.dtype) if weight is None else weight.masked_fill(masks.excluded, 0)
    return target, weight


class SigmoidStatistics:
    """The normaliser of reweighted negatives, the loss, and the bias gradient of queries, updated tile by tile.

    With β the loss needs the normaliser, which needs all tiles: the loss of a query is held as sums that the normaliser
    multiplies afterwards.
    """

    def __init__(self, queries: Samples, negatives: Negatives, bias: Tensor, *, counts_batch: bool):
        self._counts_batch = counts_batch
        like, n = queries.features, len(queries)
        self._options, self._bias = negatives, bias
        self.accuracy = InBatchAccuracy(n, like)
        self._positive_loss, self._positive_d_bias = like.new_zeros(n), like.new_zeros(n)
        self._negative_loss, self._negative_d_bias = like.new_zeros(n), like.new_zeros(n)
        # With β: sums over negatives, divided by exp(_peak) so that they stay finite.
        self._peak = like.new_full((n,), -torch.inf)
        self._weight_sum, self._negatives = like.new_zeros(n), like.new_zeros(n)

    def update(self, part: slice, logits_rc: Tensor, masks: Masks, *, candidate_dim: int, in_batch: bool) -> None:
        """Takes in one tile; part: the queries in it."""
        dim = candidate_dim
        if in_batch:
            self.accuracy.update(part, logits_rc, masks, logits_rc.amax(dim), candidate_dim=dim)
            if not self._counts_batch:
                return
        positive = positives(masks, logits_rc)
        negative = ~positive if masks.excluded is None else ~(positive | masks.excluded)
        target, _ = _target_and_weight(logits_rc, masks, self._options, None)
        z = logits_rc + self._bias
        loss, d_bias = F.softplus(z) - target * z, torch.sigmoid(z) - target
        self._positive_loss[part] += (loss * positive).sum(dim)
        self._positive_d_bias[part] += (d_bias * positive).sum(dim)
        if self._options.beta:
            raw = (self._options.beta * logits_rc).masked_fill(~negative, -torch.inf)
            peak = torch.maximum(self._peak[part], raw.amax(dim))
            held = peak.nan_to_num(neginf=0.0)  # a query without negatives so far
            rescale = (self._peak[part] - held).exp()
            for total in (self._negative_loss, self._negative_d_bias, self._weight_sum):
                total[part] *= rescale
            self._peak[part] = peak
            weight = (raw - held.unsqueeze(dim)).exp()
            self._weight_sum[part] += weight.sum(dim)
            self._negatives[part] += negative.sum(dim)
        else:
            weight = negative
        self._negative_loss[part] += (loss * weight).sum(dim)
        self._negative_d_bias[part] += (d_bias * weight).sum(dim)

    def finish(self, scale: Tensor) -> QueryLosses:
        """The losses [n], with the statistics that `Sigmoid.weights` needs."""
        if not self._options.beta:
            d_bias = (self._positive_d_bias + self._negative_d_bias).sum()
            return QueryLosses(self._positive_loss + self._negative_loss, {}, d_bias)
        factor = self._negatives / self._weight_sum.clamp_min(torch.finfo(self._weight_sum.dtype).tiny)
        d_bias = (self._positive_d_bias + factor * self._negative_d_bias).sum()
        shift = self._peak.nan_to_num(neginf=0.0) - factor.clamp_min(torch.finfo(factor.dtype).tiny).log()
        return QueryLosses(self._positive_loss + factor * self._negative_loss, {"shift": shift}, d_bias)
