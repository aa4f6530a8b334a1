"""Softmax cross-entropy of rows over candidates, in two passes over tiles: statistics first, then gradient weights.

For row i with candidates j, target y and log-weights a (0, or log w_ij of a reweighted negative):
loss_i = log Σ_j exp(S_ij + a_ij) − Σ_j y_ij·S_ij, and its gradient for S_ij is softmax_ij(S + a) − y_ij.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsclip.losses.accuracy import InBatchAccuracy
from dsclip.losses.fused import log_sum_exp, pair_weights, use_fused
from dsclip.losses.masks import Masks, own_pairs
from dsclip.losses.pairs import Negatives
from dsclip.losses.sides import Side
from dsclip.losses.tile_size import Scratch


class CrossEntropy:
    """The criterion of InfoNCE and FILIP. Images ask about texts, and texts about images."""

    texts_ask = True
    has_bias = False

    def __init__(self, negatives: Negatives, bias: Tensor | None, scratch: Scratch):
        self.negatives, self._scratch = negatives, scratch

    def statistics(self, asker: Side, *, are_images: bool) -> Statistics:
        """An empty accumulator for the askers' rows."""
        return Statistics(asker, self.negatives, self._scratch)

    def pair_weights(self, logits: Tensor, row_masks: Masks, col_masks: Masks, rows: Side, cols: Side) -> Tensor | None:
        """The weights [r, c] of both directions in one pass over the tile; None where there is no fused way."""
        if not self.negatives.one_hot or not use_fused(logits):
            return None
        row_lse, col_lse = rows.stats["lse"], cols.stats["lse"]
        weights = pair_weights(logits, row_lse, col_lse, row_masks.excluded, col_masks.excluded)
        if row_masks.diagonal is not None:
            weights.diagonal(row_masks.diagonal).sub_(2)
        return weights

    def weights(self, logits: Tensor, masks: Masks, asker: Side, *, cols_ask: bool, reuse: bool) -> Tensor:
        """The gradient [r, c] of Σ_i loss_i for the logits. With `reuse` it takes the logits' memory."""

        def facing(name):
            return asker.stats[name][None, :] if cols_ask else asker.stats[name][:, None]

        options = self.negatives
        if options.one_hot:
            weights = logits if reuse else self._scratch("weights", *logits.shape, logits)
            torch.sub(logits, facing("lse"), out=weights).exp_()
            if masks.excluded is not None:
                weights.masked_fill_(masks.excluded, 0)
            if masks.diagonal is not None:
                weights.diagonal(masks.diagonal).sub_(1)
            return weights
        positive = own_pairs(masks, logits)
        seen = logits
        if options.beta:
            seen = torch.where(positive, logits, (1 + options.beta) * logits - facing("shift"))
        weights = (seen - facing("lse")).exp_()
        if masks.excluded is not None:
            weights.masked_fill_(masks.excluded, 0)
        weights -= positive * ((1 - options.label_smoothing) / facing("positives"))
        if options.label_smoothing:
            share = options.label_smoothing / facing("candidates")
            weights -= share if masks.excluded is None else share * ~masks.excluded
        return weights


class Statistics:
    """What the rows of one direction need of all their candidates, gathered tile by tile."""

    def __init__(self, asker: Side, negatives: Negatives, scratch: Scratch):
        like = asker.features
        n = len(asker)
        self._own, self._options, self._scratch = asker.own, negatives, scratch
        self._lse = like.new_full((n,), -torch.inf)  # of positives and, without reweighting, of negatives
        self.accuracy = InBatchAccuracy(n, like)
        if not negatives.one_hot:
            self._negative_lse = like.new_full((n,), -torch.inf)  # of (1 + β)·S
            self._weight_lse = like.new_full((n,), -torch.inf)  # of β·S
            self._positive_sum, self._sum = like.new_zeros(n), like.new_zeros(n)
            self._positives, self._negatives, self._candidates = (like.new_zeros(n) for _ in range(3))

    def add(self, part: slice, logits: Tensor, masks: Masks, *, cols_ask: bool, in_batch: bool) -> None:
        """One tile [r, c]; part: the askers in it."""
        dim = 0 if cols_ask else 1
        fused = self._options.one_hot and use_fused(logits)
        best, lse = log_sum_exp(logits, masks.excluded, dim) if fused else (logits.amax(dim), None)
        if in_batch:
            self.accuracy.add(part, logits, masks, best, cols_ask=cols_ask)
        if fused:
            self._lse[part] = torch.logaddexp(self._lse[part], lse)
            return
        if self._options.one_hot:
            self._lse[part] = torch.logaddexp(self._lse[part], self._log_sum_exp(logits, masks.excluded, best, dim))
            return
        positive, beta = own_pairs(masks, logits), self._options.beta
        negative = ~positive if masks.excluded is None else ~(positive | masks.excluded)

        def merge(total: Tensor, values: Tensor, chosen: Tensor) -> None:
            values = values.masked_fill(~chosen, -torch.inf)
            total[part] = torch.logaddexp(total[part], torch.logsumexp(values, dim))

        merge(self._lse, logits, positive if beta else positive | negative)
        if beta:
            merge(self._negative_lse, (1 + beta) * logits, negative)
            merge(self._weight_lse, beta * logits, negative)
        self._positive_sum[part] += (logits * positive).sum(dim)
        self._positives[part] += positive.sum(dim)
        self._negatives[part] += negative.sum(dim)
        if self._options.label_smoothing:
            self._sum[part] += (logits * (positive | negative)).sum(dim)
            self._candidates[part] += (positive | negative).sum(dim)

    def _log_sum_exp(self, logits: Tensor, excluded: Tensor | None, best: Tensor, dim: int) -> Tensor:
        """Over the entries that are not excluded; `best` is the largest logit of each row."""
        seen = self._scratch("weights", *logits.shape, logits)
        if excluded is not None:
            seen.copy_(logits).masked_fill_(excluded, -torch.inf)
            best = seen.amax(dim).clamp_min(torch.finfo(logits.dtype).min)  # a row may have nothing left in this tile
            logits = seen
        torch.sub(logits, best.unsqueeze(dim), out=seen).exp_()
        return seen.sum(dim).log_().add_(best)

    def finish(self) -> tuple[dict[str, Tensor], Tensor]:
        """The statistics [n] by name, and the loss [n] of each row."""
        if self._options.one_hot:
            return {"lse": self._lse}, self._lse - self._own
        options, stats = self._options, {}
        if options.beta:
            # w_ij = exp(β·S_ij) / mean over the row's negatives: log w_ij = β·S_ij − shift_i. No negatives, no shift.
            stats["shift"] = self._weight_lse.nan_to_num(neginf=0.0) - self._negatives.clamp_min(1).log()
            stats["lse"] = torch.logaddexp(self._lse, self._negative_lse - stats["shift"])
        else:
            stats["lse"] = self._lse
        stats["positives"] = self._positives
        target = self._positive_sum / self._positives
        if options.label_smoothing:
            stats["candidates"] = self._candidates
            smooth = options.label_smoothing
            target = (1 - smooth) * target + smooth * self._sum / self._candidates
        return stats, stats["lse"] - target
