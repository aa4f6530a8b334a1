"""Similarities of queries and candidates, tile by tile, with their exact gradients.

A tile holds the logits of r rows and c columns in both directions: with the rows as queries, and with the columns. Every
similarity is positively homogeneous of degree one in either, so a scale can sit on the rows.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dsclip.losses.products import Precision, Products
from dsclip.losses.samples import Samples
from dsclip.losses.tile_size import Scratch

PRODUCTS = (
    1 << 15
)  # matrices of a batched product: a GPU's grid has 65,535 places in the dimension that cuBLAS may put them in


class Tile(NamedTuple):
    """row_logits, col_logits [r, c]: rows as queries, columns as queries (one tensor when they are equal).

    best_col_token [r, T_row, c], best_row_token [r, c, T_col]: which token matched best, in token-wise similarities.
    """

    row_logits: Tensor
    col_logits: Tensor
    best_col_token: Tensor | None = None
    best_row_token: Tensor | None = None


class Similarity(Protocol):
    """How similar two samples are. Made anew for each evaluation of a loss, with memory for tiles: `Similarity(scratch)`."""

    def cells(self, rows: Samples, cols: Samples) -> int:
        """Numbers that one entry of a tile takes while it is computed."""

    def tile(self, rows: Samples, cols: Samples, scale: Tensor) -> Tile:
        """scale times the similarity of every row with every column, in both directions."""

    def paired_logits(self, rows: Samples, cols: Samples, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [r] of row i with column i, with the row and with the column as query."""

    def accumulate_gradient(
        self,
        tile: Tile,
        row_weights: Tensor | None,
        col_weights: Tensor | None,
        rows: Samples,
        cols: Samples,
        d_rows: Tensor,
        d_cols: Tensor | None,
    ) -> None:
        """Adds the gradient for the features, without the scale, to d_rows and d_cols (None: not wanted).

        row_weights, col_weights [r, c]: the gradient for the tile's logits of either direction; None: there is none.
        """


class Cosine:
    """The dot product of unit features [r, D]. precision: of the products; None: that of the device, see `products`."""

    def __init__(self, scratch: Scratch, precision: Precision | None = None):
        self._scratch, self._products = scratch, Products(precision)

    def cells(self, rows: Samples, cols: Samples) -> int:
        """Numbers that one entry of a tile takes."""
        return 1

    def tile(self, rows: Samples, cols: Samples, scale: Tensor) -> Tile:
        """Logits scale·rows·columnsᵀ."""
        scaled_rD = self._scratch("rows", len(rows), rows.features.shape[1], rows.features)
        torch.mul(rows.features, scale, out=scaled_rD)
        logits_rc = self._scratch("logits", len(rows), len(cols), rows.features)
        products = self._products
        products.multiply(
            products.operand(scaled_rD), products.operand(cols.features, is_bf16=cols.is_bf16).T, out=logits_rc
        )
        return Tile(logits_rc, logits_rc)

    def paired_logits(self, rows: Samples, cols: Samples, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [r] of row i with column i, both directions."""
        logits_r = row_products(rows.features, cols.features) * scale
        return logits_r, logits_r

    def accumulate_gradient(
        self,
        tile: Tile,
        row_weights: Tensor | None,
        col_weights: Tensor | None,
        rows: Samples,
        cols: Samples,
        d_rows: Tensor,
        d_cols: Tensor | None,
    ) -> None:
        """Adds weights·columns to d_rows, and weightsᵀ·rows to d_cols."""
        weights_rc = row_weights if col_weights is None else col_weights
        if row_weights is not None and col_weights is not None:
            weights_rc = row_weights.add_(col_weights)
        if weights_rc is None:
            return
        products = self._products
        weights = products.operand(weights_rc)
        products.add(d_rows, weights, products.operand(cols.features, is_bf16=cols.is_bf16))
        if d_cols is not None:
            products.add(d_cols, weights.T, products.operand(rows.features, is_bf16=rows.is_bf16))


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """Σ over all but the first dimension of x·y, [r], without a copy of either."""
    parts = zip(x.split(PRODUCTS), y.split(PRODUCTS), strict=True)
    return torch.cat([torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1)).view(-1) for a, b in parts])
