"""The tiled loss: gather features, statistics in tiles, gather those, gradients in tiles. No autograd, no N×N matrix.

Features are gathered all at once, or pass round a rank at a time in each of the two passes (`gathering`).

S = s·I·Tᵀ, cut into tiles of r rows and c columns. The same for every similarity (cosine, late interaction) and every
criterion (cross-entropy, sigmoid). Shapes are in `dsclip.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsclip.losses.criterion import Criterion, Statistics
from dsclip.losses.gathering import Gathered
from dsclip.losses.group import Group
from dsclip.losses.masks import tile_masks
from dsclip.losses.pairs import LossGrads, Negatives, Pairs
from dsclip.losses.samples import Samples
from dsclip.losses.similarity import Similarity, Tile, row_products
from dsclip.losses.tile_size import Scratch, tile_shape


@torch.no_grad()
def tiled_loss(
    pairs: Pairs,
    *,
    similarity: Callable[[Scratch], Similarity],
    criterion: Callable[[Negatives, Tensor | None, Scratch], Criterion],
    negatives: Negatives,
    group: Group,
    tile_entries: int | None = None,
) -> LossGrads:
    """The loss of the global batch and its exact gradients for this rank's features. Collective.

    tile_entries: largest number of similarities held at a time; None: what is fast on the device.
    """
    scratch = Scratch()
    return _TiledLoss(
        pairs, similarity(scratch), criterion(negatives, pairs.bias, scratch), negatives, group, tile_entries
    ).run()


class _Gradients(NamedTuple):
    """Without the factor s/normaliser. scale []: Σ G∘S/s of this rank's rows."""

    image: Tensor
    text: Tensor
    hard: Tensor | None
    scale: Tensor


class _TiledLoss:
    def __init__(
        self,
        pairs: Pairs,
        similarity: Similarity,
        criterion: Criterion,
        negatives: Negatives,
        group: Group,
        tile_entries: int | None,
    ):
        self.pairs, self.similarity, self.criterion = pairs, similarity, criterion
        self.negatives, self.group = negatives, group
        self.scale = pairs.log_scale.exp().to(torch.promote_types(pairs.image.dtype, torch.float32))
        self.tile_entries = tile_entries
        # One rank's block of images × texts is also its block of texts × images: half of the products fall away.
        self.alone = group.world_size == 1
        self.masked = torch.zeros((), dtype=torch.int64, device=pairs.image.device)

    def run(self) -> LossGrads:
        samples = Gathered(self.pairs, self.group, lambda i, t: self.similarity.paired_logits(i, t, self.scale))
        image_statistics = self.criterion.statistics(samples.local.image, are_images=True)
        text_statistics = self.criterion.statistics(samples.local.text, are_images=False)
        self._statistics_pass(samples, image_statistics, text_statistics)
        image_losses, text_losses = image_statistics.finish(self.scale), text_statistics.finish(self.scale)

        # Cross-entropy is the mean of two directions; the sigmoid counts every entry once.
        normaliser = len(samples) * (2 if self.criterion.both_directions else 1)
        samples.add_statistics(image_losses.statistics, text_losses.statistics)
        gradients = self._gradient_pass(samples)
        for gradient in (gradients.image, gradients.text, gradients.hard):
            if gradient is not None:
                gradient.mul_(self.scale / normaliser)
        scalars = [
            (image_losses.loss.sum() + text_losses.loss.sum()) / normaliser,
            gradients.scale * self.scale / normaliser,
        ]
        for losses in (image_losses, text_losses):
            if losses.d_log_scale is not None:
                scalars[1] = scalars[1] + losses.d_log_scale / normaliser
        if image_losses.d_bias is not None and text_losses.d_bias is not None:
            scalars.append((image_losses.d_bias + text_losses.d_bias) / normaliser)
        loss, d_log_scale, *d_bias = self.group.all_reduce_sum(torch.stack(scalars))
        return LossGrads(
            loss=loss,
            d_image=gradients.image,
            d_text=gradients.text,
            d_hard_text=gradients.hard,
            d_log_scale=d_log_scale,
            d_bias=d_bias[0] if d_bias else None,
            correct_image=image_statistics.accuracy.correct(),
            correct_text=text_statistics.accuracy.correct(),
            masked=self.masked,
        )

    def _statistics_pass(self, samples: Gathered, image: Statistics, text: Statistics) -> None:
        """The first pass over all tiles."""
        local = samples.local
        for block in samples.blocks():
            if self.alone:
                self._update_statistics(local.image, block.text, image, text)
            else:
                self._update_statistics(local.image, block.text, image, None)
                self._update_statistics(local.text, block.image, text, None)
            if block.hard is not None:
                self._update_statistics(local.image, block.hard, image, None)
        if samples.queue_image is not None and samples.queue_text is not None:
            self._update_statistics(local.image, samples.queue_text, image, None)
            self._update_statistics(local.text, samples.queue_image, text, None)

    def _gradient_pass(self, samples: Gathered) -> _Gradients:
        """The second pass over all tiles.

        The similarities are homogeneous of degree one, so that Σ G∘S over all entries of a row is ⟨gradient, row⟩
        (Euler): images see every entry but those of texts with the queue.
        """
        image, text, hard = samples.local.image, samples.local.text, samples.local.hard
        d_image, d_text = torch.zeros_like(image.features), torch.zeros_like(text.features)
        d_hard = None if hard is None else torch.zeros_like(hard.features)
        d_scale = torch.zeros_like(self.scale)
        both = self.criterion.both_directions
        if samples.queue_image is not None and samples.queue_text is not None:
            self._accumulate(text, samples.queue_image, d_text, None, row_queries=True, col_queries=False)
            d_scale += _inner(d_text, text.features)
            self._accumulate(image, samples.queue_text, d_image, None, row_queries=True, col_queries=False)
        for block in samples.blocks():
            if self.alone:
                self._accumulate(image, block.text, d_image, d_text, row_queries=True, col_queries=both)
            else:
                self._accumulate(image, block.text, d_image, None, row_queries=True, col_queries=both)
                self._accumulate(text, block.image, d_text, None, row_queries=both, col_queries=True)
            if block.hard is not None:
                into = d_hard if self.alone else None
                self._accumulate(image, block.hard, d_image, into, row_queries=True, col_queries=False)
            if hard is not None and d_hard is not None and not self.alone:
                self._accumulate(hard, block.image, d_hard, None, row_queries=False, col_queries=True)
        return _Gradients(d_image, d_text, d_hard, d_scale + _inner(d_image, image.features))

    def _update_statistics(
        self, rows: Samples, cols: Samples, row_statistics: Statistics, col_statistics: Statistics | None
    ) -> None:
        """Rows with columns, tile by tile; with col_statistics also the columns as queries."""
        for row_part, col_part, r, c in self._tiles(rows, cols):
            tile = self.similarity.tile(r, c, self.scale)
            self._update(row_statistics, row_part, tile.row_logits, r, c, candidate_dim=1)
            if col_statistics is not None:
                self._update(col_statistics, col_part, tile.col_logits, r, c, candidate_dim=0)

    def _update(
        self, statistics: Statistics, part: slice, logits_rc: Tensor, r: Samples, c: Samples, *, candidate_dim: int
    ) -> None:
        masks = tile_masks(logits_rc, r, c, self.negatives, self.scale, candidate_dim=candidate_dim)
        if masks.excluded is not None and c.owner is None:
            self.masked += masks.excluded.sum()
        statistics.update(part, logits_rc, masks, candidate_dim=candidate_dim, in_batch=c.first is not None)

    def _accumulate(
        self,
        rows: Samples,
        cols: Samples,
        d_rows: Tensor,
        d_cols: Tensor | None,
        *,
        row_queries: bool,
        col_queries: bool,
    ) -> None:
        """Adds the gradient of the losses of the rows, of the columns, or of both, tile by tile."""
        for row_part, col_part, r, c in self._tiles(rows, cols):
            tile = self.similarity.tile(r, c, self.scale)
            row_weights, col_weights = self._weights(tile, r, c, row_queries, col_queries)
            d_tile_cols = None if d_cols is None else d_cols[col_part]
            self.similarity.accumulate_gradient(tile, row_weights, col_weights, r, c, d_rows[row_part], d_tile_cols)
            del tile, row_weights, col_weights

    def _weights(
        self, tile: Tile, r: Samples, c: Samples, row_queries: bool, col_queries: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of a tile's logits by direction; that of both comes first where they are the same logits."""
        row_weights = col_weights = row_masks = col_masks = None
        if row_queries:
            row_masks = tile_masks(tile.row_logits, r, c, self.negatives, self.scale, candidate_dim=1)
        if col_queries:
            col_masks = tile_masks(tile.col_logits, r, c, self.negatives, self.scale, candidate_dim=0)
        if row_masks is not None and col_masks is not None and tile.row_logits is tile.col_logits:
            both = self.criterion.pair_weights(tile.row_logits, row_masks, col_masks, r, c)
            if both is not None:
                return both, None
        if row_masks is not None:
            row_weights = self.criterion.weights(
                tile.row_logits, row_masks, r, candidate_dim=1, reuse=col_masks is None
            )
        if col_masks is not None:
            col_weights = self.criterion.weights(tile.col_logits, col_masks, c, candidate_dim=0, reuse=True)
        return row_weights, col_weights

    def _tiles(self, rows: Samples, cols: Samples) -> Iterator[tuple[slice, slice, Samples, Samples]]:
        cells = self.similarity.cells(rows, cols)
        height, width = tile_shape(len(rows), len(cols), cells, self.tile_entries, rows.features.device)
        for top in range(0, len(rows), height):
            row_part = slice(top, min(top + height, len(rows)))
            r = rows.part(row_part.start, row_part.stop)
            for left in range(0, len(cols), width):
                col_part = slice(left, min(left + width, len(cols)))
                yield row_part, col_part, r, cols.part(col_part.start, col_part.stop)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return row_products(x, y).sum()
