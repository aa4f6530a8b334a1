"""SigLIP's pairwise sigmoid (Zhai et al. 2023, algorithm 1), with the same negatives as the softmax.

loss = −(1/N) Σ_ij w_ij·[y_ij·log σ(S_ij + b) + (1 − y_ij)·log σ(−S_ij − b)]; an entry is counted once, by its image's
row. Texts ask only about the images of the queue. Label smoothing: y becomes (1 − ε)·y + ε/2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsclip.losses.accuracy import InBatchAccuracy
from dsclip.losses.masks import Masks, own_pairs
from dsclip.losses.pairs import Negatives
from dsclip.losses.sides import Side
from dsclip.losses.tile_size import Scratch


class Sigmoid:
    """The criterion of SigLIP."""

    texts_ask = False
    has_bias = True

    def __init__(self, negatives: Negatives, bias: Tensor | None, scratch: Scratch):
        self.negatives, self._bias = negatives, bias

    def statistics(self, asker: Side, *, are_images: bool) -> Statistics:
        """An empty accumulator for the askers' rows. Texts leave the entries of the batch to the images."""
        return Statistics(asker, self.negatives, self._bias, counts_batch=are_images)

    def pair_weights(self, logits: Tensor, row_masks: Masks, col_masks: Masks, rows: Side, cols: Side) -> None:
        """Only one direction asks about an entry: nothing to put together."""

    def weights(self, logits: Tensor, masks: Masks, asker: Side, *, cols_ask: bool, reuse: bool) -> Tensor:
        """The gradient [r, c] of Σ_i loss_i for the logits."""
        shift = None
        if self.negatives.beta:
            shift = asker.stats["shift"][None, :] if cols_ask else asker.stats["shift"][:, None]
        target, weight = _target_and_weight(logits, masks, self.negatives, shift)
        weights = torch.sigmoid(logits + self._bias).sub_(target)
        return weights if weight is None else weights.mul_(weight)


def _target_and_weight(logits, masks: Masks, negatives: Negatives, shift: Tensor | None):
    """The target y [r, c], and the weight w [r, c] of each entry, None where all are 1."""
    positive = own_pairs(masks, logits)
    target = positive.to(logits.dtype)
    if negatives.label_smoothing:
        target = target * (1 - negatives.label_smoothing) + negatives.label_smoothing / 2
    weight = None
    if shift is not None:
        weight = torch.where(positive, 1.0, (negatives.beta * logits - shift).exp())
    if masks.excluded is not None:
        weight = (~masks.excluded).to(logits.dtype) if weight is None else weight.masked_fill(masks.excluded, 0)
    return target, weight


class Statistics:
    """The normaliser of reweighted negatives, the loss, and the bias gradient of rows, gathered tile by tile.

    With β the loss needs the normaliser, which needs all tiles: the loss of a row is kept as sums that the normaliser
    multiplies afterwards.
    """

    def __init__(self, asker: Side, negatives: Negatives, bias: Tensor, *, counts_batch: bool):
        self._counts_batch = counts_batch
        like, n = asker.features, len(asker)
        self._options, self._bias = negatives, bias
        self.accuracy = InBatchAccuracy(n, like)
        self._positive_loss, self._positive_d_bias = like.new_zeros(n), like.new_zeros(n)
        self._negative_loss, self._negative_d_bias = like.new_zeros(n), like.new_zeros(n)
        # With β: sums over negatives, divided by exp(_peak) so that they stay finite.
        self._peak = like.new_full((n,), -torch.inf)
        self._weight_sum, self._negatives = like.new_zeros(n), like.new_zeros(n)

    def add(self, part: slice, logits: Tensor, masks: Masks, *, cols_ask: bool, in_batch: bool) -> None:
        """One tile [r, c]; part: the askers in it."""
        dim = 0 if cols_ask else 1
        if in_batch:
            self.accuracy.add(part, logits, masks, logits.amax(dim), cols_ask=cols_ask)
            if not self._counts_batch:
                return
        positive = own_pairs(masks, logits)
        negative = ~positive if masks.excluded is None else ~(positive | masks.excluded)
        target, _ = _target_and_weight(logits, masks, self._options, None)
        z = logits + self._bias
        loss, d_bias = F.softplus(z) - target * z, torch.sigmoid(z) - target
        self._positive_loss[part] += (loss * positive).sum(dim)
        self._positive_d_bias[part] += (d_bias * positive).sum(dim)
        if self._options.beta:
            raw = (self._options.beta * logits).masked_fill(~negative, -torch.inf)
            peak = torch.maximum(self._peak[part], raw.amax(dim))
            held = peak.nan_to_num(neginf=0.0)  # a row without negatives so far
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

    def finish(self) -> tuple[dict[str, Tensor], Tensor]:
        """The statistics [n] by name, and the loss [n] of each row."""
        if not self._options.beta:
            self.d_bias = (self._positive_d_bias + self._negative_d_bias).sum()
            return {}, self._positive_loss + self._negative_loss
        factor = self._negatives / self._weight_sum.clamp_min(torch.finfo(self._weight_sum.dtype).tiny)
        self.d_bias = (self._positive_d_bias + factor * self._negative_d_bias).sum()
        shift = self._peak.nan_to_num(neginf=0.0) - factor.clamp_min(torch.finfo(factor.dtype).tiny).log()
        return {"shift": shift}, self._positive_loss + factor * self._negative_loss
