"""The loss stage: gather features, statistics in tiles, gather those, gradients in tiles. No autograd, no N×N matrix.

Symbols: N global batch, n pairs of this rank, d embedding width, S = s·I·Tᵀ. The stage is the same
for every similarity (cosine, late interaction) and every criterion (cross-entropy, sigmoid).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsclip.losses.group import Group
from dsclip.losses.masks import masks
from dsclip.losses.pairs import LossGrads, Negatives, Pairs
from dsclip.losses.sides import Side, Sides, gather_sides
from dsclip.losses.similarity import row_products
from dsclip.losses.tile_size import Scratch, tile_shape


@torch.no_grad()
def contrast(
    pairs: Pairs, *, similarity, criterion, negatives: Negatives, group: Group, tile_entries: int | None = None
) -> LossGrads:
    """The loss of the global batch and its exact gradients for this rank's features. Collective.

    tile_entries: largest number of similarities held at a time; None: what is fast on the device.
    """
    scratch = Scratch()
    criterion = criterion(negatives, pairs.bias, scratch)
    return _Stage(pairs, similarity(scratch), criterion, negatives, group, tile_entries).run()


class _Stage:
    def __init__(self, pairs: Pairs, similarity, criterion, negatives: Negatives, group: Group, tile_entries):
        self.pairs, self.similarity, self.criterion = pairs, similarity, criterion
        self.negatives, self.group = negatives, group
        self.scale = pairs.log_scale.exp().to(torch.promote_types(pairs.image.dtype, torch.float32))
        self.tile_entries = tile_entries
        # One rank's block of images × texts is also its block of texts × images: half of the products fall away.
        self.alone = group.world_size == 1
        self.masked = torch.zeros((), dtype=torch.int64, device=pairs.image.device)

    def run(self) -> LossGrads:
        sides = gather_sides(self.pairs, self.group, lambda i, t: self.similarity.own(i, t, self.scale))
        image_stats = self.criterion.statistics(sides.image, are_images=True)
        text_stats = self.criterion.statistics(sides.text, are_images=False)
        self._observe_all(sides, image_stats, text_stats)
        image_kept, image_loss = image_stats.finish()
        text_kept, text_loss = text_stats.finish()
        image, text, all_image, all_text = self._share_statistics(sides, image_kept, text_kept)

        total = len(sides.all_image)
        # Cross-entropy is the mean of two directions; the sigmoid counts every entry once.
        normaliser = 2 * total if self.criterion.texts_ask else total
        d_image, d_text, d_hard, d_scale = self._pull_all(sides, image, text, all_image, all_text)
        for gradient in filter(lambda x: x is not None, (d_image, d_text, d_hard)):
            gradient.mul_(self.scale / normaliser)
        sums = [(image_loss.sum() + text_loss.sum()) / normaliser, d_scale * self.scale / normaliser]
        if self.criterion.has_bias:
            sums.append((image_stats.d_bias + text_stats.d_bias) / normaliser)
        sums = self.group.all_reduce_sum(torch.stack(sums))
        return LossGrads(
            loss=sums[0],
            d_image=d_image,
            d_text=d_text,
            d_hard_text=d_hard,
            d_log_scale=sums[1],
            d_bias=sums[2] if self.criterion.has_bias else None,
            correct_image=image_stats.accuracy.correct(),
            correct_text=text_stats.accuracy.correct(),
            masked=self.masked,
        )

    def _observe_all(self, sides: Sides, image_stats, text_stats) -> None:
        if self.alone:
            self._observe(sides.image, sides.all_text, image_stats, text_stats)
        else:
            self._observe(sides.image, sides.all_text, image_stats, None)
            self._observe(sides.text, sides.all_image, text_stats, None)
        if sides.all_hard is not None:
            self._observe(sides.image, sides.all_hard, image_stats, None)
        if sides.queue_text is not None:
            self._observe(sides.image, sides.queue_text, image_stats, None)
            self._observe(sides.text, sides.queue_image, text_stats, None)

    def _share_statistics(self, sides: Sides, image_kept: dict, text_kept: dict) -> tuple[Side, Side, Side, Side]:
        """This rank's and all sides with their statistics; one all-gather for all of them."""
        names = list(image_kept)
        everything = {}
        if names and not self.alone:
            local = torch.stack([*image_kept.values(), *text_kept.values()], dim=1)
            gathered = self.group.all_gather(local).unbind(1)
            everything = {"image": dict(zip(names, gathered, strict=False))}
            everything["text"] = dict(zip(names, gathered[len(names) :], strict=True))
        all_image = sides.all_image.with_stats(everything.get("image", image_kept))
        all_text = sides.all_text.with_stats(everything.get("text", text_kept))
        return sides.image.with_stats(image_kept), sides.text.with_stats(text_kept), all_image, all_text

    def _pull_all(self, sides: Sides, image: Side, text: Side, all_image: Side, all_text: Side):
        """Gradients without the factor s/normaliser, and Σ G∘S/s.

        The similarities are homogeneous of degree one, so that Σ G∘S over all entries of a row is ⟨gradient, row⟩
        (Euler): images see every entry but those of texts with the queue.
        """
        d_image, d_text = torch.zeros_like(image.features), torch.zeros_like(text.features)
        d_hard, d_scale = None, torch.zeros_like(self.scale)
        both = dict(rows_ask=True, cols_ask=self.criterion.texts_ask)
        if sides.queue_text is not None:
            self._pull(text, sides.queue_image, d_text, None, rows_ask=True, cols_ask=False)
            d_scale += _inner(d_text, text.features)
            self._pull(image, sides.queue_text, d_image, None, rows_ask=True, cols_ask=False)
        if self.alone:
            self._pull(image, all_text, d_image, d_text, **both)
        else:
            self._pull(image, all_text, d_image, None, **both)
            self._pull(text, all_image, d_text, None, rows_ask=self.criterion.texts_ask, cols_ask=True)
        if sides.hard is not None:
            d_hard = torch.zeros_like(sides.hard.features)
            if self.alone:
                self._pull(image, sides.all_hard, d_image, d_hard, rows_ask=True, cols_ask=False)
            else:
                self._pull(image, sides.all_hard, d_image, None, rows_ask=True, cols_ask=False)
                self._pull(sides.hard, all_image, d_hard, None, rows_ask=False, cols_ask=True)
        return d_image, d_text, d_hard, d_scale + _inner(d_image, image.features)

    def _observe(self, rows: Side, cols: Side, row_stats, col_stats) -> None:
        for row_slice, col_slice, r, c in self._tiles(rows, cols):
            tile = self.similarity.tile(r, c, self.scale)
            self._add(row_stats, row_slice, tile.row_logits, r, c, cols_ask=False)
            if col_stats is not None:
                self._add(col_stats, col_slice, tile.col_logits, r, c, cols_ask=True)

    def _add(self, stats, part: slice, logits: Tensor, r: Side, c: Side, *, cols_ask: bool) -> None:
        seen = masks(logits, r, c, self.negatives, self.scale, cols_ask=cols_ask)
        if seen.excluded is not None and c.owner is None:
            self.masked += seen.excluded.sum()
        stats.add(part, logits, seen, cols_ask=cols_ask, in_batch=c.first is not None)

    def _pull(self, rows: Side, cols: Side, d_rows: Tensor, d_cols: Tensor | None, *, rows_ask, cols_ask) -> None:
        for row_slice, col_slice, r, c in self._tiles(rows, cols):
            tile = self.similarity.tile(r, c, self.scale)
            row_weights, col_weights = self._weights(tile, r, c, rows_ask, cols_ask)
            d_tile_cols = None if d_cols is None else d_cols[col_slice]
            self.similarity.pull(tile, row_weights, col_weights, r, c, d_rows[row_slice], d_tile_cols)
            del tile, row_weights, col_weights

    def _weights(self, tile, r: Side, c: Side, rows_ask: bool, cols_ask: bool) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of a tile's logits by direction; that of both comes first where they are the same logits."""
        row_weights = col_weights = None
        by_row = by_col = None
        if rows_ask:
            by_row = masks(tile.row_logits, r, c, self.negatives, self.scale, cols_ask=False)
        if cols_ask:
            by_col = masks(tile.col_logits, r, c, self.negatives, self.scale, cols_ask=True)
        if rows_ask and cols_ask and tile.row_logits is tile.col_logits:
            both = self.criterion.pair_weights(tile.row_logits, by_row, by_col, r, c)
            if both is not None:
                return both, None
        if rows_ask:
            row_weights = self.criterion.weights(tile.row_logits, by_row, r, cols_ask=False, reuse=not cols_ask)
        if cols_ask:
            col_weights = self.criterion.weights(tile.col_logits, by_col, c, cols_ask=True, reuse=True)
        return row_weights, col_weights

    def _tiles(self, rows: Side, cols: Side) -> Iterator[tuple[slice, slice, Side, Side]]:
        cells = self.similarity.cells(rows, cols)
        height, width = tile_shape(len(rows), len(cols), cells, self.tile_entries, rows.features.device)
        for top in range(0, len(rows), height):
            row_slice = slice(top, min(top + height, len(rows)))
            r = rows.part(row_slice.start, row_slice.stop)
            for left in range(0, len(cols), width):
                col_slice = slice(left, min(left + width, len(cols)))
                yield row_slice, col_slice, r, cols.part(col_slice.start, col_slice.stop)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return row_products(x, y).sum()
