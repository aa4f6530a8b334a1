"""Softmax cross-entropy of queries over candidates, in two passes over tiles: statistics first, then gradient weights.

For query i with candidates j, target y and log-weights a (0, or log w_ij of a reweighted negative):
loss_i = log Σ_j exp(S_ij + a_ij) − Σ_j y_ij·S_ij, and its gradient for S_ij is softmax_ij(S + a) − y_ij. Debiased, the sum
is another, and a softmax is multiplied by what `debiased` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsclip.losses.accuracy import InBatchAccuracy
from dsclip.losses.criterion import QueryLosses
from dsclip.losses.debiased import debias
from dsclip.losses.fused import log_sum_exp, pair_weights, use_fused
from dsclip.losses.masks import Masks, positives
from dsclip.losses.pairs import Negatives
from dsclip.losses.samples import Samples
from dsclip.losses.tile_size import Scratch


class CrossEntropy:
    """The criterion of InfoNCE and FILIP: images are queries of texts, and texts of images."""

    both_directions = True
    has_bias = False

    def __init__(self, negatives: Negatives, bias: Tensor | None, scratch: Scratch):
        self.negatives, self._scratch = negatives, scratch

    def statistics(self, queries: Samples, *, are_images: bool) -> SoftmaxStatistics:
        """Empty statistics of these queries."""
        return SoftmaxStatistics(queries, self.negatives, self._scratch)

    def pair_weights(
        self, logits_rc: Tensor, row_masks: Masks, col_masks: Masks, rows: Samples, cols: Samples
    ) -> Tensor | None:
        """The weights [r, c] of both directions in one pass over the tile; None where there is no fused way."""
        if not self.negatives.one_hot or not use_fused(logits_rc):
            return None
        row_lse, col_lse = rows.statistics["lse"], cols.statistics["lse"]
        weights_rc = pair_weights(logits_rc, row_lse, col_lse, row_masks.excluded, col_masks.excluded)
        if row_masks.diagonal is not None:
            weights_rc.diagonal(row_masks.diagonal).sub_(2)
        return weights_rc

    def weights(self, logits_rc: Tensor, masks: Masks, queries: Samples, *, candidate_dim: int, reuse: bool) -> Tensor:
        """The gradient [r, c] of Σ_i loss_i for the logits. With `reuse` it takes the logits' memory."""
        of_query = {name: x.unsqueeze(candidate_dim) for name, x in queries.statistics.items()}
        options = self.negatives
        if options.one_hot:
            weights_rc = logits_rc if reuse else self._scratch("weights", len(logits_rc), logits_rc.shape[1], logits_rc)
            torch.sub(logits_rc, of_query["lse"], out=weights_rc).exp_()
            if masks.excluded is not None:
                weights_rc.masked_fill_(masks.excluded, 0)
            if masks.diagonal is not None:
                weights_rc.diagonal(masks.diagonal).sub_(1)
            return weights_rc
        positive = positives(masks, logits_rc)
        reweighted = logits_rc
        if options.beta:
            reweighted = torch.where(positive, logits_rc, (1 + options.beta) * logits_rc - of_query["shift"])
        weights_rc = (reweighted - of_query["lse"]).exp_()
        if options.debiased and masks.drawn:
            weights_rc *= torch.where(positive, of_query["of_positive"], of_query["of_drawn"])
        if masks.excluded is not None:
            weights_rc.masked_fill_(masks.excluded, 0)
        weights_rc -= positive * ((1 - options.label_smoothing) / of_query["positives"])
        if options.label_smoothing:
            share = options.label_smoothing / of_query["candidates"]
            weights_rc -= share if masks.excluded is None else share * ~masks.excluded
        return weights_rc


class SoftmaxStatistics:
    """What the queries of one direction need of all their candidates, updated tile by tile."""

    def __init__(self, queries: Samples, negatives: Negatives, scratch: Scratch):
        like = queries.features
        n = len(queries)
        self._positive_logit, self._options, self._scratch = queries.positive_logit, negatives, scratch
        self._lse = like.new_full((n,), -torch.inf)  # of positives and, unless these stand apart, of negatives
        self.accuracy = InBatchAccuracy(n, like)
        if not negatives.one_hot:
            self._apart = bool(negatives.beta or negatives.debiased)
            # Of (1 + β)·S: of negatives, and debiased of those that were made, which then stand apart too; and of β·S.
            self._negative_lse, self._made_lse, self._weight_lse = (like.new_full((n,), -torch.inf) for _ in range(3))
            self._drawn = like.new_zeros(n)
            self._positive_sum, self._sum = like.new_zeros(n), like.new_zeros(n)
            self._positives, self._negatives, self._candidates = (like.new_zeros(n) for _ in range(3))

    def update(self, part: slice, logits_rc: Tensor, masks: Masks, *, candidate_dim: int, in_batch: bool) -> None:
        """Takes in one tile; part: the queries in it."""
        dim = candidate_dim
        lse = None
        if self._options.one_hot and use_fused(logits_rc):
            best, lse = log_sum_exp(logits_rc, masks.excluded, dim)
        else:
            best = logits_rc.amax(dim)
        if in_batch:
            self.accuracy.update(part, logits_rc, masks, best, candidate_dim=dim)
        if self._options.one_hot:
            if lse is None:
                lse = self._log_sum_exp(logits_rc, masks.excluded, best, dim)
            self._lse[part] = torch.logaddexp(self._lse[part], lse)
            return
        positive, beta = positives(masks, logits_rc), self._options.beta
        negative = ~positive if masks.excluded is None else ~(positive | masks.excluded)

        def merge(total: Tensor, values: Tensor, chosen: Tensor) -> None:
            values = values.masked_fill(~chosen, -torch.inf)
            total[part] = torch.logaddexp(total[part], torch.logsumexp(values, dim))

        merge(self._lse, logits_rc, positive if self._apart else positive | negative)
        if self._apart:
            made = self._options.debiased and not masks.drawn
            merge(self._made_lse if made else self._negative_lse, (1 + beta) * logits_rc, negative)
        if beta:
            merge(self._weight_lse, beta * logits_rc, negative)
        if masks.drawn:
            self._drawn[part] += negative.sum(dim)
        self._positive_sum[part] += (logits_rc * positive).sum(dim)
        self._positives[part] += positive.sum(dim)
        self._negatives[part] += negative.sum(dim)
        if self._options.label_smoothing:
            self._sum[part] += (logits_rc * (positive | negative)).sum(dim)
            self._candidates[part] += (positive | negative).sum(dim)

    def _log_sum_exp(self, logits_rc: Tensor, excluded: Tensor | None, best: Tensor, dim: int) -> Tensor:
        """Over the entries that are not excluded; `best` is the largest logit of each query."""
        shifted = self._scratch("weights", len(logits_rc), logits_rc.shape[1], logits_rc)
        if excluded is not None:
            shifted.copy_(logits_rc).masked_fill_(excluded, -torch.inf)
            # A query may have nothing left in this tile.
            best = shifted.amax(dim).clamp_min(torch.finfo(logits_rc.dtype).min)
            logits_rc = shifted
        torch.sub(logits_rc, best.unsqueeze(dim), out=shifted).exp_()
        return shifted.sum(dim).log_().add_(best)

    def finish(self, scale: Tensor) -> QueryLosses:
        """The losses [n], with the statistics that `CrossEntropy.weights` needs."""
        if self._options.one_hot:
            if self._positive_logit is None:
                raise ValueError("these samples have no partner and can't be queries")
            return QueryLosses(self._lse - self._positive_logit, {"lse": self._lse})
        options = self._options
        statistics: dict[str, Tensor] = {}
        shift, d_log_scale = torch.zeros_like(self._lse), None
        if options.beta:
            # w_ij = exp(β·S_ij) / mean over the query's negatives: log w_ij = β·S_ij − shift_i. No negatives, no shift.
            shift = statistics["shift"] = self._weight_lse.nan_to_num(neginf=0.0) - self._negatives.clamp_min(1).log()
        if options.debiased:
            found = debias(
                self._lse, self._positives, self._negative_lse - shift, self._drawn, self._made_lse - shift,
                share=options.debiased, scale=scale,
            )  # fmt: skip
            statistics |= {"lse": found.lse, "of_positive": found.of_positive, "of_drawn": found.of_drawn}
            d_log_scale = found.d_log_scale.sum()
        elif options.beta:
            statistics["lse"] = torch.logaddexp(self._lse, self._negative_lse - shift)
        else:
            statistics["lse"] = self._lse
        statistics["positives"] = self._positives
        target = self._positive_sum / self._positives
        if options.label_smoothing:
            statistics["candidates"] = self._candidates
            smooth = options.label_smoothing
            target = (1 - smooth) * target + smooth * self._sum / self._candidates
        return QueryLosses(statistics["lse"] - target, statistics, d_log_scale=d_log_scale)
