"""Alignment, uniformity and the cosine similarities of features."""

import math

import pytest
import torch

from dsclip.losses.feature_statistics import ROWS, feature_statistics
from tests.test_losses import unit


def test_alignment_and_uniformity_of_hand_made_features():
    """Two opposite images and captions turned by 60°: ‖I−T‖² = 2 − 2·cos 60° = 1, and ‖x−y‖² = 4 within a modality."""
    image = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    text = torch.tensor([[0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]])
    found = feature_statistics(image, text)
    assert found.alignment.item() == pytest.approx(1.0, abs=1e-6)
    assert found.uniformity.item() == pytest.approx(-8.0, abs=1e-5)  # log exp(−2·4)
    assert found.positive.tolist() == pytest.approx([0.5, 0.5])
    assert found.negative.tolist() == pytest.approx([-0.5, -0.5])


def test_entries_off_the_diagonal_come_row_by_row():
    image, text = torch.randn(2, 5, 8)
    statistics = feature_statistics(image, text)
    assert torch.equal(statistics.negative, (image @ text.T)[~torch.eye(5, dtype=torch.bool)])


@pytest.mark.parametrize("rows", [2, 7, ROWS, ROWS + 9])
def test_statistics_are_those_of_float64_over_all_pairs_of_the_first_rows(rows):
    image, text = unit(rows, 8, seed=rows), unit(rows, 8, seed=rows + 1)
    found = feature_statistics(image.float(), text.float())
    image, text = image[:256].double(), text[:256].double()
    uniformity = [torch.pdist(x).square().mul(-2).exp().mean().log() for x in (image, text)]
    assert found.alignment.item() == pytest.approx((image - text).square().sum(1).mean().item(), rel=1e-5)
    assert found.uniformity.item() == pytest.approx(sum(uniformity).item() / 2, rel=1e-5)
    assert len(found.positive) == len(image)
