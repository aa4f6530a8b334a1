"""Which entries of a tile are positives, and which are left out, seen from the side that asks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsclip.losses.pairs import Negatives
from dsclip.losses.sides import Side


@dataclass(frozen=True)
class Masks:
    """positive, excluded [r, c] bool; None when there are none. diagonal: offset of the own pairs, without masks.

    Where `positive` is None and `diagonal` is set, the own pairs on that diagonal are the only positives.
    """

    positive: Tensor | None
    excluded: Tensor | None
    diagonal: int | None


def masks(logits: Tensor, rows: Side, cols: Side, negatives: Negatives, scale: Tensor, *, cols_ask: bool) -> Masks:
    """The masks of a tile [r, c]; with cols_ask the columns are those that ask about the rows."""
    asker, candidate = (cols, rows) if cols_ask else (rows, cols)
    in_batch = asker.first is not None and candidate.first is not None
    # torch's diagonal(k) is entry (i, i + k): row i of the tile is sample rows.first + i.
    diagonal = rows.first - cols.first if in_batch else None
    if in_batch and not _overlap(rows, cols):
        diagonal = None
    positive = excluded = None

    def facing(x: Tensor, side: Side) -> Tensor:
        return x[:, None] if side is rows else x[None, :]

    if negatives.duplicates != "negative" and asker.key is not None and candidate.key is not None:
        same = facing(asker.key, asker) == facing(candidate.key, candidate)
        if in_batch and negatives.duplicates == "positive":
            positive = same
        else:
            excluded = same
    if negatives.hard == "own" and candidate.owner is not None:
        row_index = torch.arange(asker.first, asker.first + len(asker), device=logits.device)
        excluded = facing(row_index, asker) != facing(candidate.owner, candidate)
    if negatives.filter_margin is not None and candidate.owner is None:
        similar = logits > facing(asker.own, asker) - negatives.filter_margin * scale
        if positive is not None:
            similar &= ~positive
        excluded = similar if excluded is None else excluded | similar
    if excluded is not None and diagonal is not None:
        excluded.diagonal(diagonal).fill_(False)  # the own pair always counts
    return Masks(positive, excluded, diagonal)


def _overlap(rows: Side, cols: Side) -> bool:
    return rows.first < cols.first + len(cols) and cols.first < rows.first + len(rows)


def own_pairs(masks_: Masks, like: Tensor) -> Tensor:
    """The positives of a tile as a bool mask [r, c], whatever form they are kept in."""
    if masks_.positive is not None:
        return masks_.positive
    own = torch.zeros_like(like, dtype=torch.bool)
    if masks_.diagonal is not None:
        own.diagonal(masks_.diagonal).fill_(True)
    return own
