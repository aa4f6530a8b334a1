"""Which entries of a tile are positives, and which are left out, for the queries of one direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsclip.losses.pairs import Negatives
from dsclip.losses.samples import Samples


@dataclass(frozen=True)
class Masks:
    """positive, excluded [r, c] bool; None when there are none. diagonal: offset of the pairs' diagonal in the tile.

    Where `positive` is None and `diagonal` is set, the pairs on that diagonal are the only positives. drawn: the
    candidates are drawn from the data; otherwise they are captions that were made to be wrong.
    """

    positive: Tensor | None
    excluded: Tensor | None
    diagonal: int | None
    drawn: bool = True


def tile_masks(
    logits_rc: Tensor, rows: Samples, cols: Samples, negatives: Negatives, scale: Tensor, *, candidate_dim: int
) -> Masks:
    """The masks of a tile, with the rows (candidate_dim 1) or the columns (0) as queries."""
    queries, candidates = (rows, cols) if candidate_dim == 1 else (cols, rows)
    query_dim = 1 - candidate_dim
    in_batch, diagonal = False, None
    if rows.first is not None and cols.first is not None:
        # torch's diagonal(k) is entry (i, i + k): row i of the tile is sample rows.first + i.
        in_batch, offset = True, rows.first - cols.first
        diagonal = offset if -len(rows) < offset < len(cols) else None
    positive = excluded = None
    if negatives.duplicates != "negative" and queries.key is not None and candidates.key is not None:
        same = queries.key.unsqueeze(candidate_dim) == candidates.key.unsqueeze(query_dim)
        if in_batch and negatives.duplicates == "positive":
            positive = same
        else:
            excluded = same
    if negatives.hard == "own" and candidates.owner is not None and queries.first is not None:
        index = torch.arange(queries.first, queries.first + len(queries), device=logits_rc.device)
        excluded = index.unsqueeze(candidate_dim) != candidates.owner.unsqueeze(query_dim)
    if negatives.filter_margin is not None and candidates.owner is None and queries.positive_logit is not None:
        similar = logits_rc > queries.positive_logit.unsqueeze(candidate_dim) - negatives.filter_margin * scale
        if positive is not None:
            similar &= ~positive
        excluded = similar if excluded is None else excluded | similar
    if excluded is not None and diagonal is not None:
        excluded.diagonal(diagonal).fill_(False)  # a pair itself always counts
    return Masks(positive, excluded, diagonal, drawn=candidates.owner is None)


def positives(masks: Masks, like: Tensor) -> Tensor:
    """The positives of a tile as a bool mask [r, c], in whichever form `masks` has them."""
    if masks.positive is not None:
        return masks.positive
    on_diagonal = torch.zeros_like(like, dtype=torch.bool)
    if masks.diagonal is not None:
        on_diagonal.diagonal(masks.diagonal).fill_(True)
    return on_diagonal
