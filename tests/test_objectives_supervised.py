"""Supervised contrast: tiles, what each query gets beside the batch, whose random numbers, and batches in which there is nothing to compare."""

import pytest
import torch

from dsclip.config.objective_section import HeadSection, ObjectiveSection, TermSection
from dsclip.config.schema import Recipe
from dsclip.errors import UserError
from dsclip.losses.group import ALONE
from dsclip.objectives import Features, build_objective
from dsclip.objectives.supervised import LEAST_SHARE, SupervisedContrast, draws
from tests import objective_reference as reference
from tests.test_losses import CLOSE, unit

ZERO = torch.tensor(0.0, dtype=torch.float64)
KEYS = torch.tensor([0, 1, 0, 2, 1, 0, 2])


def case(n=7, width=5):
    return {name: unit(n, width, seed=i) for i, name in enumerate(("image", "image_2"))}


@pytest.mark.parametrize("entries", [1, 30, 10_000])
def test_tiles_of_any_size_give_the_value_and_gradients_of_the_reference(entries):
    views, seed = case(), (4, 9)
    term = SupervisedContrast(("image", "image_2"), 0.3, 1.0, entries=entries)
    found = term(Features(views, ZERO, KEYS, seed=seed), group=ALONE)
    leaves = [x.clone().requires_grad_() for x in views.values()]
    value = reference.supervised(leaves, KEYS, draws(seed, 14, 1.0), 0.3, 1.0)
    value.backward()
    torch.testing.assert_close(found.value, value.detach(), **CLOSE)
    for name, leaf in zip(views, leaves, strict=True):
        torch.testing.assert_close(found.d_views[name], leaf.grad, **CLOSE)


def test_mixtures_are_drawn_by_seed_and_step_alone():
    views = case()
    term = SupervisedContrast(("image", "image_2"), mixup=1.0)
    values = [
        term(Features(views, ZERO, KEYS, seed=seed), group=ALONE).value for seed in ((0, 3), (0, 3), (0, 4), (1, 3))
    ]
    assert values[0] == values[1] and len({x.item() for x in values}) == 3
    of_positive, of_negative, which = draws((5, 2), 20_000, 2.0)
    assert (
        abs(of_positive.mean() - 0.5) < 0.01 and abs(of_positive.var() - 1 / 20) < 0.003
    )  # Beta(α, α): 1/(4·(2α + 1))
    assert of_negative.min() == LEAST_SHARE and of_negative.max() > 0.95
    assert 0 <= which.min() and which.max() < 1 and abs(which.mean() - 0.5) < 0.01


def test_a_mixed_positive_is_harder_than_the_positives_and_a_mixed_negative_than_its_negative():
    views = case(40, 8)
    keys = torch.arange(40) % 4
    harder = {
        mixed: SupervisedContrast(tuple(views), 0.2, 1.0, mixed)(Features(views, ZERO, keys), group=ALONE).value
        for mixed in ("positive", "negative", "both")
    }
    plain = SupervisedContrast(tuple(views), 0.2)(Features(views, ZERO, keys), group=ALONE).value
    assert plain < harder["negative"] < harder["both"]
    assert harder["positive"] != plain


def test_a_draw_that_float32_rounds_to_one_is_the_last_negative():
    z, keys = unit(5, 4, seed=3, dtype=torch.float32), torch.tensor([0, 1, 0, 1, 0])
    same = keys[:1, None] == keys
    drawn = torch.tensor([[0.5], [1.0], [1.0]])
    (mixture,), _ = SupervisedContrast(("image",), mixed="negative")._mixtures(
        z, slice(0, 1), z[:1] @ z.T, same, ~same, drawn
    )
    torch.testing.assert_close(mixture, z[3:4])


@pytest.mark.parametrize("mixup", [None, 1.0])
@pytest.mark.parametrize("keys", [[0], [0, 1, 2], [1, 1, 1]])
def test_batches_without_positives_or_negatives_give_finite_gradients(keys, mixup):
    x = {"image": unit(len(keys), 4, seed=1)}
    found = SupervisedContrast(("image",), 0.1, mixup, focal=True)(Features(x, ZERO, torch.tensor(keys)), group=ALONE)
    assert found.value.isfinite() and found.d_views["image"].isfinite().all()
    assert (found.value > 0) == (len(set(keys)) < len(keys))
    plain = SupervisedContrast(("image",), 0.1, focal=True)(Features(x, ZERO, torch.tensor(keys)), group=ALONE)
    assert found.value == plain.value, "there is nothing to mix"


def test_what_it_can_not_compare_is_refused():
    with pytest.raises(UserError, match="needs the key of each sample"):
        SupervisedContrast(("image",))(Features(case(), ZERO), group=ALONE)
    head = HeadSection("narrow", "projector", "image", 3)
    term = TermSection("supervised_contrast", ["image.narrow", "text"])
    with pytest.raises(UserError, match="`supervised_contrast` multiplies features of one width"):
        build_objective(Recipe(objective=ObjectiveSection(terms=[term], heads=[head])), 6)
    assert ObjectiveSection(terms=[term]).needs_keys
