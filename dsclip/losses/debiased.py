"""Negatives without the share of them that are positives nobody marked (Chuang et al. 2020, Debiased Contrastive Learning).

Candidates are drawn from the data, and with probability τ⁺ one is of the query's own class. With P = Σ exp S over the
query's M positives, B = Σ w·exp S over the K negatives that were drawn, the sum over *true* negatives is estimated by

    Γ = max((B − τ⁺·K·P/M) / (1 − τ⁺), K·e⁻ˢ)        loss = log(P + Γ + C) − Σ_j y_j·S_j

(the paper's K·g; e⁻ˢ is the least that exp S of unit features can be). With β, w are the weights of Robinson et al. 2021,
whose estimator it then is. Captions that were made to be wrong (C) are no draws from the data and are not corrected.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Debiased(NamedTuple):
    """All [n]. lse: log(P + Γ + C). of_positive, of_drawn: what exp(S − lse) of each is multiplied by in the gradient.

    d_log_scale: the gradient for log s that goes through the floor e⁻ˢ, not through the logits.
    """

    lse: Tensor
    of_positive: Tensor
    of_drawn: Tensor
    d_log_scale: Tensor


def debias(
    positive_lse: Tensor, positives: Tensor, drawn_lse: Tensor, drawn: Tensor, made_lse: Tensor, *,
    share: float, scale: Tensor,
) -> Debiased:  # fmt: skip
    """log P, M, log B, K and log C of n queries, each [n]; share: τ⁺; scale []: s."""
    top = torch.maximum(torch.maximum(positive_lse, drawn_lse), made_lse)  # of what is added: nothing overflows
    positive, negative, made = ((x - top).exp() for x in (positive_lse, drawn_lse, made_lse))
    # Kept apart as a factor of P: its part in the gradient of every positive is the same.
    taken = share * drawn / positives
    estimate, floor = (negative - taken * positive) / (1 - share), drawn * (-scale - top).exp()
    floored = estimate < floor
    total = positive + torch.where(floored, floor, estimate) + made
    return Debiased(
        lse=total.log() + top,
        of_positive=torch.where(floored, 1.0, 1 - taken / (1 - share)),
        of_drawn=(~floored).to(total.dtype) / (1 - share),
        d_log_scale=torch.where(floored, -scale * floor / total, 0.0),
    )
