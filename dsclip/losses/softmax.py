"""InfoNCE over the global batch, both directions, with exact gradients of features and temperature.

No autograd and no N×N matrix: log-sum-exps first, then gradients, each in tiles of rows. Symbols as in DESIGN.md §1:
N global batch, n rows of this rank, d embedding width, S = s·I·Tᵀ, p its row softmax, q its column softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsclip.losses.group import Group, SingleRank

DEFAULT_TILE_ROWS = 1024


@dataclass(frozen=True)
class ContrastiveGrads:
    """What a loss returns: its value and its exact gradients.

    loss [] mean over the global batch, in nats; d_image, d_text [n, d]: gradient of the *global* loss for this rank's
    features; d_log_scale []: its gradient for log s, already summed over ranks. correct_image, correct_text: how many
    of this rank's images (captions) rank their own caption (image) first in the global batch.
    """

    loss: Tensor
    d_image: Tensor
    d_text: Tensor
    d_log_scale: Tensor
    correct_image: Tensor
    correct_text: Tensor


@torch.no_grad()
def softmax_contrastive(
    image: Tensor, text: Tensor, log_scale: Tensor, *, group: Group | None = None, tile_rows: int = DEFAULT_TILE_ROWS
) -> ContrastiveGrads:
    """The CLIP loss -½·mean(log p_ii) - ½·mean(log q_ii) with its gradients.

    image, text [n, d]: unit rows, float32 or float64; log_scale []: log of s. Every rank passes the same n.
    With G = (p + q - 2·Id)/(2N): dI = s·G·T, dT = s·Gᵀ·I, d log s = Σ G∘S.
    Communicates the features once and their log-sum-exps once; nothing in backward.
    Source: Radford et al. 2021, figure 3; local gradients as in DisCo-CLIP (Chen et al. 2023), tiles as in Inf-CL.
    """
    group = group or SingleRank()
    all_image, all_text = group.all_gather(image), group.all_gather(text)
    total, first = len(all_image), group.rank * len(image)
    scale = log_scale.exp().to(image.dtype)

    image_lse, image_own, correct_image = _log_sum_exp(image, all_text, scale, first, tile_rows)
    text_lse, text_own, correct_text = _log_sum_exp(text, all_image, scale, first, tile_rows)
    both = group.all_gather(torch.stack([image_lse, text_lse], dim=1))
    all_image_lse, all_text_lse = both[:, 0], both[:, 1]

    d_image = _gradient(image, all_text, scale, image_lse, all_text_lse, first, tile_rows)
    d_text = _gradient(text, all_image, scale, text_lse, all_image_lse, first, tile_rows)
    local_loss = (image_lse - image_own + text_lse - text_own).sum() / (2 * total)
    # Σ G∘S over this rank's rows is Σ ⟨dI, I⟩, because dI = s·G·T.
    sums = group.all_reduce_sum(torch.stack([local_loss, (d_image * image).sum()]))
    return ContrastiveGrads(sums[0], d_image, d_text, sums[1], correct_image, correct_text)


def _log_sum_exp(rows: Tensor, columns: Tensor, scale: Tensor, first: int, tile_rows: int):
    """Row log-sum-exp [n] of scale·rows·columnsᵀ, the own pair's logit [n], and how many rows rank it first."""
    lse, own, correct = [], [], torch.zeros((), dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), tile_rows):
        logits = scale * (rows[start : start + tile_rows] @ columns.T)
        diagonal = logits.diagonal(first + start)[: len(logits)]
        lse.append(torch.logsumexp(logits, dim=1))
        own.append(diagonal.clone())
        correct += (diagonal >= logits.amax(dim=1)).sum()
    return torch.cat(lse), torch.cat(own), correct


def _gradient(rows, columns, scale, row_lse, column_lse, first, tile_rows) -> Tensor:
    """s·G·columns for this rank's rows [n, d]."""
    parts = []
    for start in range(0, len(rows), tile_rows):
        tile = slice(start, start + tile_rows)
        logits = scale * (rows[tile] @ columns.T)
        weights = (logits - row_lse[tile, None]).exp_()
        weights += (logits.sub_(column_lse)).exp_()
        weights.diagonal(first + start)[: len(weights)].sub_(2)
        parts.append(weights @ columns)
    return torch.cat(parts) * (scale / (2 * len(columns)))
