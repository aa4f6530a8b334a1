"""What the features look like: numbers and histograms for TensorBoard, on a few rows of one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 256


@dataclass(frozen=True)
class FeatureStatistics:
    """alignment E‖I_i − T_i‖² and uniformity log E exp(−2‖x − y‖²) over pairs of different samples, the mean of both
    modalities (Wang & Isola 2020). positive [k], negative [k·(k−1)]: cosine similarities of images with captions."""

    alignment: Tensor
    uniformity: Tensor
    positive: Tensor
    negative: Tensor


@torch.no_grad()
def feature_statistics(image: Tensor, text: Tensor) -> FeatureStatistics:
    """Of the first rows of image, text [n, d], unit rows. With one row the uniformity is NaN."""
    image, text = image[:ROWS].float(), text[:ROWS].float()
    similarity = image @ text.T
    positive = similarity.diagonal()
    return FeatureStatistics(
        alignment=(2 - 2 * positive).mean(),  # ‖x − y‖² of unit vectors
        uniformity=(_uniformity(image) + _uniformity(text)) / 2,
        positive=positive,
        negative=_off_diagonal(similarity),
    )


def _uniformity(x: Tensor) -> Tensor:
    squared_distance = 2 - 2 * (x @ x.T)
    return (-2 * _off_diagonal(squared_distance)).exp().mean().log()


def _off_diagonal(x: Tensor) -> Tensor:
    """The entries of x [k, k] off its diagonal, row by row, [k·(k−1)]. A mask would ask a GPU how many there are."""
    k = len(x)
    return x.flatten()[1:].view(k - 1, k + 1)[:, :-1].flatten()
