"""InfoNCE, the loss of CLIP (Radford et al. 2021, figure 3): dense, as one would write it down, and in tiles.

Both give the same numbers; shapes are in `dsclip.losses`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsclip.losses.cross_entropy import CrossEntropy
from dsclip.losses.group import ALONE, Group
from dsclip.losses.pairs import PLAIN, LossGrads, Negatives, Pairs
from dsclip.losses.similarity import Cosine
from dsclip.losses.tiled import tiled_loss


def dense_info_nce(image_ND: Tensor, text_ND: Tensor, log_scale: Tensor) -> LossGrads:
    """−½·mean(log p_ii) − ½·mean(log q_ii) with its exact gradients, on one process and with N×N matrices."""
    N, scale = len(image_ND), log_scale.exp()
    logits_NN = scale * image_ND @ text_ND.T
    log_p_NN = logits_NN.log_softmax(dim=1)  # an image is the query, all texts are candidates
    log_q_NN = logits_NN.log_softmax(dim=0)  # a text is the query, all images are candidates
    d_logits_NN = (log_p_NN.exp() + log_q_NN.exp() - 2 * torch.eye(N).to(logits_NN)) / (2 * N)
    pair_N = logits_NN.diagonal()
    return LossGrads(
        loss=-(log_p_NN.diagonal() + log_q_NN.diagonal()).mean() / 2,
        d_image=scale * d_logits_NN @ text_ND,
        d_text=scale * d_logits_NN.T @ image_ND,
        d_log_scale=(d_logits_NN * logits_NN).sum(),
        correct_image=(pair_N >= logits_NN.amax(dim=1)).sum(),
        correct_text=(pair_N >= logits_NN.amax(dim=0)).sum(),
    )


def softmax(
    pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries: int | None = None
) -> LossGrads:
    """The same over the pairs of all ranks, with any negatives, and without a matrix larger than a tile."""
    return tiled_loss(
        pairs, similarity=Cosine, criterion=CrossEntropy, negatives=negatives, group=group, tile_entries=tile_entries
    )
