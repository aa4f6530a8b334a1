"""Similarities of two sides, tile by tile, with their exact gradients.

A tile holds the logits of r rows and c columns in both directions: from rows to columns, and from columns to rows.
Both similarities are positively homogeneous of degree one in either side, so a scale can sit on the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsclip.losses.sides import Side
from dsclip.losses.tile_size import Scratch


@dataclass(frozen=True)
class Tile:
    """row_logits, col_logits [r, c]: what rows see of columns and columns of rows (one tensor when they are equal)."""

    row_logits: Tensor
    col_logits: Tensor
    best_col_token: Tensor | None = None  # [r, T_row, c]
    best_row_token: Tensor | None = None  # [r, c, T_col]


class Cosine:
    """The dot product of unit features [r, d]."""

    def __init__(self, scratch: Scratch):
        self._scratch = scratch

    def cells(self, rows: Side, cols: Side) -> int:
        """Numbers that one entry of a tile takes."""
        return 1

    def tile(self, rows: Side, cols: Side, scale: Tensor) -> Tile:
        """Logits scale·rows·columnsᵀ."""
        scaled = self._scratch("rows", *rows.features.shape, rows.features)
        torch.mul(rows.features, scale, out=scaled)
        logits = self._scratch("logits", len(rows), len(cols), rows.features)
        torch.mm(scaled, cols.features.T, out=logits)
        return Tile(logits, logits)

    def own(self, rows: Side, cols: Side, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [r] of row i with column i, both directions."""
        own = row_products(rows.features, cols.features) * scale
        return own, own

    def pull(self, tile: Tile, row_weights, col_weights, rows: Side, cols: Side, d_rows, d_cols) -> None:
        """Adds the gradient, without the scale, for weights [r, c] of either direction (None: no gradient)."""
        weights = row_weights if col_weights is None else col_weights
        if row_weights is not None and col_weights is not None:
            weights = row_weights.add_(col_weights)
        d_rows.addmm_(weights, cols.features)
        if d_cols is not None:
            d_cols.addmm_(weights.T, rows.features)


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """Σ over all but the first dimension of x·y, [r], without a copy of either."""
    return torch.bmm(x.reshape(len(x), 1, -1), y.reshape(len(y), -1, 1)).view(-1)


class LateInteraction:
    """FILIP (Yao et al. 2022, eq. 4-5): the mean over a sample's tokens of each token's best match in the other.

    Features are tokens [r, T, d] with `valid`. Best matches of rows and of columns differ, so the two directions do.
    """

    def __init__(self, scratch: Scratch):
        del scratch  # its tiles are few and large

    def cells(self, rows: Side, cols: Side) -> int:
        """Numbers that one entry of a tile takes: all pairs of tokens."""
        return rows.features.shape[1] * cols.features.shape[1]

    def tile(self, rows: Side, cols: Side, scale: Tensor) -> Tile:
        """Logits of both directions; scale·mean_k max_l x_k·y_l and the reverse."""
        (r, row_tokens, width), (c, col_tokens, _) = rows.features.shape, cols.features.shape
        x, y = (rows.features * scale).reshape(-1, width), cols.features.reshape(-1, width)
        each = (x @ y.T).view(r, row_tokens, c, col_tokens)
        by_row, best_col = _hide(each, cols.valid, (1, 1, c, col_tokens)).max(dim=3)  # [r, T_row, c]
        by_col, best_row = _hide(each, rows.valid, (r, row_tokens, 1, 1)).max(dim=1)  # [r, c, T_col]
        row_logits = (by_row * _share(rows)[:, :, None]).sum(1)
        col_logits = (by_col * _share(cols)[None]).sum(2)
        return Tile(row_logits, col_logits, best_col, best_row)

    def own(self, rows: Side, cols: Side, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [r] of row i with column i, both directions."""
        each = (rows.features * scale) @ cols.features.transpose(1, 2)  # [r, T_row, T_col]
        by_row = each if cols.valid is None else each.masked_fill(~cols.valid[:, None, :], -torch.inf)
        by_col = each if rows.valid is None else each.masked_fill(~rows.valid[:, :, None], -torch.inf)
        return (by_row.amax(2) * _share(rows)).sum(1), (by_col.amax(1) * _share(cols)).sum(1)

    def pull(self, tile: Tile, row_weights, col_weights, rows: Side, cols: Side, d_rows, d_cols) -> None:
        """Adds the gradient, without the scale: each weight goes to the pairs of tokens that matched best."""
        (r, row_tokens, width), (c, col_tokens, _) = rows.features.shape, cols.features.shape
        each = rows.features.new_zeros(r, row_tokens, c, col_tokens)
        if row_weights is not None:
            spread = row_weights[:, None, :] * _share(rows)[:, :, None]
            each.scatter_add_(3, tile.best_col_token[..., None], spread[..., None])
        if col_weights is not None:
            spread = col_weights[:, :, None] * _share(cols)[None]
            each.scatter_add_(1, tile.best_row_token[:, None], spread[:, None])
        each = each.view(r * row_tokens, c * col_tokens)
        d_rows += (each @ cols.features.reshape(-1, width)).view(d_rows.shape)
        if d_cols is not None:
            d_cols += (each.T @ rows.features.reshape(-1, width)).view(d_cols.shape)


def _hide(each: Tensor, valid: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    return each if valid is None else each.masked_fill(~valid.view(shape), -torch.inf)


def _share(side: Side) -> Tensor:
    """The part of each token [r, T] in its sample's mean; none for tokens that don't exist."""
    if side.valid is None:
        return side.features.new_full(side.features.shape[:2], 1 / side.features.shape[1])
    return side.valid / side.valid.sum(1, keepdim=True).to(side.features.dtype)
