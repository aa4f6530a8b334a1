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
    different = ~torch.eye(len(image), dtype=torch.bool, device=image.device)
    positive = similarity.diagonal()
    return FeatureStatistics(
        alignment=(2 - 2 * positive).mean(),  # ‖x − y‖² of unit vectors
        uniformity=(_uniformity(image, different) + _uniformity(text, different)) / 2,
        positive=positive,
        negative=similarity[different],
    )


def _uniformity(x: Tensor, different: Tensor) -> Tensor:
    squared_distance = 2 - 2 * (x @ x.T)
    return (-2 * squared_distance[different]).exp().mean().log()
