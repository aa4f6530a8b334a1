"""The dense InfoNCE that opens the folder is the tiled softmax; what a loss lacks is said."""

import math
from dataclasses import replace

import pytest
import torch

from dsclip import losses
from dsclip.errors import UserError
from dsclip.losses import Pairs
from tests.test_losses import CLOSE, Case, unit


@pytest.mark.parametrize("shape", [(1, 3), (7, 4), (40, 16)])
def test_the_tiled_softmax_is_the_dense_one_and_that_is_autograds(shape):
    image, text = unit(*shape, seed=1), unit(*shape, seed=2)
    log_scale = torch.tensor(math.log(20.0), dtype=torch.float64)
    dense = losses.dense_info_nce(image, text, log_scale)
    tiled = losses.softmax(Pairs(image, text, log_scale), tile_entries=30)
    leaves = [x.clone().requires_grad_() for x in (image, text, log_scale)]
    logits, target = leaves[2].exp() * leaves[0] @ leaves[1].T, torch.arange(len(image))
    cross_entropy = torch.nn.functional.cross_entropy
    loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    expected = dict(zip(("d_image", "d_text", "d_log_scale"), torch.autograd.grad(loss, leaves), strict=True))
    for name, value in {"loss": loss.detach(), **expected}.items():
        torch.testing.assert_close(getattr(dense, name), value, **CLOSE)
        torch.testing.assert_close(getattr(tiled, name), value, **CLOSE)
    assert dense.correct_image == tiled.correct_image and dense.correct_text == tiled.correct_text


def test_what_a_loss_lacks_is_said():
    case = Case("sigmoid", 1, 4)
    with pytest.raises(UserError, match="needs a bias"):
        losses.sigmoid(replace(case.pairs(0), bias=None))
    with pytest.raises(UserError, match="without hard_owner"):
        losses.softmax(replace(case.pairs(0), hard_owner=None))
    with pytest.raises(UserError, match="without queue_text"):
        losses.softmax(replace(case.pairs(0), queue_text=None))
