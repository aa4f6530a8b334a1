"""A loss from a plain function refuses what the function doesn't see, when it is asked for and when it is called."""

from dataclasses import replace

import pytest
import torch

from dsclip import losses
from dsclip.config.schema import LossSection
from dsclip.errors import UserError
from dsclip.losses import Negatives
from tests.test_losses import Case
from tests.test_losses_registry import DENSE

losses.register("dense", DENSE)
ASKED = {
    "duplicates": "mask", "label_smoothing": 0.1, "beta": 0.5, "filter_margin": 0.1, "hard_negatives": "own", "queue_size": 8, "debiased": 0.1, "gather": "ring",
}  # fmt: skip


@pytest.mark.parametrize("key", ASKED)
def test_a_recipe_that_asks_for_it_is_refused(key):
    losses.check_options(losses.find_loss("dense"), LossSection(name="dense"))
    losses.check_options(losses.find_loss("softmax"), LossSection(**{key: ASKED[key]}))
    with pytest.raises(UserError, match=f"loss.{key}={ASKED[key]}"):
        losses.check_options(losses.find_loss("dense"), LossSection(name="dense", **{key: ASKED[key]}))


def test_a_token_wise_one_is_refused():
    losses.register("dense tokens", DENSE, token_wise=True)
    with pytest.raises(UserError, match="`dense tokens` was made by from_dense and can't be token-wise"):
        losses.check_options(losses.find_loss("dense tokens"), LossSection(name="dense tokens"))


@pytest.mark.parametrize("key", ["duplicates", "label_smoothing", "beta", "filter_margin", "debiased"])
def test_a_call_with_an_option_is_refused(key):
    with pytest.raises(UserError, match=key):
        DENSE(Case("dense", 1, 3, extras=False).pairs(0), negatives=Negatives(**{key: ASKED[key]}))


def test_a_call_with_hard_negatives_a_queue_or_tokens_is_refused():
    pairs = Case("softmax", 1, 4).pairs(0)
    with pytest.raises(UserError, match="hard negatives"):
        DENSE(pairs)
    with pytest.raises(UserError, match="a queue"):
        DENSE(replace(pairs, hard_text=None))
    with pytest.raises(UserError, match="not tokens"):
        DENSE(Case("filip", 1, 3, extras=False).pairs(0))
    assert torch.isfinite(DENSE(replace(pairs, hard_text=None, queue_image=None)).loss)
