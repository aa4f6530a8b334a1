"""FILIP (Yao et al. 2022): InfoNCE over a similarity of tokens instead of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from dsclip.errors import UserError
from dsclip.losses.cross_entropy import CrossEntropy
from dsclip.losses.group import ALONE, Group
from dsclip.losses.pairs import PLAIN, LossGrads, Negatives, Pairs
from dsclip.losses.products import Precision, Products
from dsclip.losses.samples import Samples
from dsclip.losses.similarity import Tile
from dsclip.losses.tile_size import Scratch
from dsclip.losses.tiled import tiled_loss


def filip(
    pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries: int | None = None
) -> LossGrads:
    """InfoNCE over token-wise late interaction. Features are tokens [n, T, D].

    Raises UserError for `debiased`: its estimate is one of samples.
    """
    if negatives.debiased:
        raise UserError(f"debiased={negatives.debiased} estimates from samples, and filip compares tokens; set it to 0")
    return tiled_loss(
        pairs,
        similarity=LateInteraction,
        criterion=CrossEntropy,
        negatives=negatives,
        group=group,
        tile_entries=tile_entries,
    )


class LateInteraction:
    """The mean over a sample's tokens of each token's best match in the other sample (Yao et al. 2022, eq. 4-5).

    Features are tokens [r, T, D] with `valid`. Best matches of rows and of columns differ, so the two directions do.
    """

    def __init__(self, scratch: Scratch, precision: Precision | None = None):
        del scratch  # its tiles are few and large
        self._products = Products(precision)

    def cells(self, rows: Samples, cols: Samples) -> int:
        """Numbers that one entry of a tile takes: all pairs of tokens."""
        return rows.features.shape[1] * cols.features.shape[1]

    def tile(self, rows: Samples, cols: Samples, scale: Tensor) -> Tile:
        """Logits of both directions; scale·mean_k max_l x_k·y_l and the reverse."""
        (r, row_tokens, width), (c, col_tokens, _) = rows.features.shape, cols.features.shape
        x, y = (rows.features * scale).reshape(-1, width), cols.features.reshape(-1, width)
        products = self._products
        tokens = products.multiply(products.operand(x), products.operand(y, is_bf16=cols.is_bf16).T)
        tokens_rTcT = tokens.view(r, row_tokens, c, col_tokens)
        by_row_rTc, best_col_rTc = _hide(tokens_rTcT, cols.valid, (1, 1, c, col_tokens)).max(dim=3)
        by_col_rcT, best_row_rcT = _hide(tokens_rTcT, rows.valid, (r, row_tokens, 1, 1)).max(dim=1)
        row_logits_rc = (by_row_rTc * _share(rows)[:, :, None]).sum(1)
        col_logits_rc = (by_col_rcT * _share(cols)[None]).sum(2)
        return Tile(row_logits_rc, col_logits_rc, best_col_rTc, best_row_rcT)

    def paired_logits(self, rows: Samples, cols: Samples, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [r] of row i with column i, both directions."""
        tokens_rTT = (rows.features * scale) @ cols.features.transpose(1, 2)
        by_row = tokens_rTT if cols.valid is None else tokens_rTT.masked_fill(~cols.valid[:, None, :], -torch.inf)
        by_col = tokens_rTT if rows.valid is None else tokens_rTT.masked_fill(~rows.valid[:, :, None], -torch.inf)
        return (by_row.amax(2) * _share(rows)).sum(1), (by_col.amax(1) * _share(cols)).sum(1)

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
        """Adds the gradient, without the scale: each weight goes to the pairs of tokens that matched best."""
        (r, row_tokens, width), (c, col_tokens, _) = rows.features.shape, cols.features.shape
        spread_rTcT = rows.features.new_zeros(r, row_tokens, c, col_tokens)
        if row_weights is not None and tile.best_col_token is not None:
            spread = row_weights[:, None, :] * _share(rows)[:, :, None]
            spread_rTcT.scatter_add_(3, tile.best_col_token[..., None], spread[..., None])
        if col_weights is not None and tile.best_row_token is not None:
            spread = col_weights[:, :, None] * _share(cols)[None]
            spread_rTcT.scatter_add_(1, tile.best_row_token[:, None], spread[:, None])
        products = self._products
        matches = products.operand(spread_rTcT.view(r * row_tokens, c * col_tokens))
        col_tokens_D = products.operand(cols.features.reshape(-1, width), is_bf16=cols.is_bf16)
        d_rows += products.multiply(matches, col_tokens_D).view(d_rows.shape)
        if d_cols is not None:
            row_tokens_D = products.operand(rows.features.reshape(-1, width), is_bf16=rows.is_bf16)
            d_cols += products.multiply(matches.T, row_tokens_D).view(d_cols.shape)


def _hide(tokens_rTcT: Tensor, valid: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    return tokens_rTcT if valid is None else tokens_rTcT.masked_fill(~valid.view(shape), -torch.inf)


def _share(samples: Samples) -> Tensor:
    """The part of each token [r, T] in its sample's mean; none for tokens that don't exist."""
    if samples.valid is None:
        return samples.features.new_full(samples.features.shape[:2], 1 / samples.features.shape[1])
    return samples.valid / samples.valid.sum(1, keepdim=True).to(samples.features.dtype)
