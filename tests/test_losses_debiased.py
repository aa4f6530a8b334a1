"""Debiased InfoNCE: what its estimate says in cases one can check by hand, large scales, and who refuses it.

`tests/test_losses.py` compares it with the dense reference, with all kinds of negatives.
"""

import math

import pytest
import torch

from dsclip import losses
from dsclip.config.schema import LossSection
from dsclip.errors import UserError
from dsclip.losses import Negatives, Pairs
from tests.test_losses import Case, unit

SHARE = 0.1


def test_negatives_as_similar_as_the_pair_are_not_corrected():
    """Γ = (K·P − τ·K·P) / (1 − τ) = K·P: the loss of a softmax over equal entries."""
    ones = torch.ones(6, 1, dtype=torch.float64)
    ours = losses.softmax(Pairs(ones, ones, torch.tensor(2.0).double()), negatives=Negatives(debiased=SHARE))
    torch.testing.assert_close(ours.loss, torch.tensor(math.log(6.0), dtype=torch.float64))


def test_at_the_floor_negatives_get_no_gradient_and_the_temperature_does():
    """Orthogonal pairs at s = 10: 4·e⁰ < τ·4·e¹⁰, so that Γ = 4·e⁻¹⁰ and the loss is log(1 + 4·e⁻²⁰)."""
    eye, scale = torch.eye(5, dtype=torch.float64), torch.tensor(10.0, dtype=torch.float64)
    ours = losses.softmax(Pairs(eye, eye, scale.log()), negatives=Negatives(debiased=SHARE))
    small = 4 * math.exp(-20)
    torch.testing.assert_close(ours.loss, torch.tensor(math.log1p(small)).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.d_log_scale, torch.tensor(-20 * small / (1 + small)).double(), rtol=1e-6, atol=0)
    assert not ours.d_image[~eye.bool()].any()


@pytest.mark.parametrize("scale", [100.0, 1000.0])
@pytest.mark.parametrize("share", [1e-30, SHARE])
def test_float32_stays_finite_and_close_at_large_scales(scale, share):
    case = Case("softmax", 1, 64, width=16, scale=scale, extras=False, dtype=torch.float32)
    case.text = unit(64, 16, seed=5, dtype=torch.float32)  # some negatives are above their pair by 100 nats and more
    options = Negatives(debiased=share)
    (ours,) = case.ours(options, 500)
    assert all(torch.isfinite(x).all() for x in (ours.loss, ours.d_image, ours.d_text, ours.d_log_scale))
    wide = Case("softmax", 1, 64, width=16, scale=scale, extras=False)
    wide.image, wide.text = case.image.double(), case.text.double()
    (exact,) = wide.ours(options, 500)
    assert abs(ours.loss - exact.loss) <= 1e-5 * exact.loss
    assert (ours.d_image - exact.d_image).norm() <= 1e-4 * exact.d_image.norm()


@pytest.mark.parametrize("name", ["sigmoid", "filip"])
def test_losses_that_have_no_such_sum_refuse_it(name):
    with pytest.raises(UserError, match=f"loss.debiased=0.1 can't be obeyed by the loss `{name}`"):
        losses.check_options(losses.find_loss(name), LossSection(name=name, debiased=0.1))
    with pytest.raises(UserError, match="debiased=0.1"):
        losses.find_loss(name)(Case(name, 1, 3).pairs(0), negatives=Negatives(debiased=0.1))


def test_a_loss_of_ones_own_says_whether_it_obeys():
    losses.register("obeys", losses.softmax, obeys={"debiased"})
    losses.register("does not", losses.softmax)
    losses.check_options(losses.find_loss("obeys"), LossSection(name="obeys", debiased=0.1))
    with pytest.raises(UserError, match="`does not`"):
        losses.check_options(losses.find_loss("does not"), LossSection(name="does not", debiased=0.1))
    with pytest.raises(UserError, match="`debaised` is none of: debiased"):
        losses.register("typo", losses.softmax, obeys={"debaised"})
