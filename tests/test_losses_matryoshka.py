"""Prefixes of features as features of their own: against the dense reference, and every loss against its own values."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.config.schema import LossSection
from dsclip.errors import UserError
from dsclip.losses import find_loss, with_prefixes
from tests import loss_reference as reference
from tests.test_losses import CLOSE, LOSSES, OPTIONS, Case
from tests.thread_ranks import ThreadRanks

DIMS, WEIGHTS = [2, 3], [0.5, 2.0]
SECTION = LossSection(matryoshka_dims=DIMS, matryoshka_weights=WEIGHTS)


def ours(case: Case, options, section=SECTION) -> list:
    loss = with_prefixes(find_loss(case.name), section, 6)
    return ThreadRanks(case.world_size).run(
        lambda group: loss(case.pairs(group.rank), negatives=options, group=group, tile_entries=7)
    )


def dense(case: Case, options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 1 of the paper with the whole feature's weight 1, divided by the sum of the weights."""
    names = ("image", "text", "hard", "log_scale", "bias")
    leaves = {n: getattr(case, n).clone().requires_grad_() for n in names if getattr(case, n) is not None}

    def prefix(x, dim):
        return None if x is None else F.normalize(x[..., :dim], dim=-1)

    value = torch.zeros((), dtype=torch.float64)
    for dim, weight in zip([*DIMS, 6], [*WEIGHTS, 1.0], strict=True):
        queue = None if case.queue is None else (*(prefix(q, dim) for q in case.queue[:2]), case.queue[2])
        value = value + weight / (1 + sum(WEIGHTS)) * reference.loss(
            case.name, prefix(leaves["image"], dim) if dim < 6 else leaves["image"],
            prefix(leaves["text"], dim) if dim < 6 else leaves["text"], leaves["log_scale"], leaves.get("bias"), options,
            reference.cosine, case.keys, (prefix(leaves["hard"], dim) if dim < 6 else leaves["hard"]) if case.hard is not None else None,
            case.hard_owner, queue,
        )  # fmt: skip
    value.backward()
    return value.detach(), {n: x.grad for n, x in leaves.items()}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("option", ["plain", "everything", "everything, masked"])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_value_and_gradients_equal_the_reference(name, option, world_size):
    case = Case(name, world_size, 4, seed=3)
    value, expected = dense(case, OPTIONS[option])
    results = ours(case, OPTIONS[option])
    for result in results:
        torch.testing.assert_close(result.loss, value, **CLOSE)
        torch.testing.assert_close(result.d_log_scale, expected["log_scale"], **CLOSE)
        if name == "sigmoid":
            torch.testing.assert_close(result.d_bias, expected["bias"], **CLOSE)
    for field, key in (("d_image", "image"), ("d_text", "text"), ("d_hard_text", "hard")):
        torch.testing.assert_close(torch.cat([getattr(r, field) for r in results]), expected[key], **CLOSE)


@given(st.sampled_from(LOSSES), st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_the_gradient_is_the_slope_of_the_value(name, seed):
    """Along a random direction of all features, token-wise losses included."""
    case = Case(name, 1, 4, seed=seed, extras=False)
    generator = torch.Generator().manual_seed(seed)
    along = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (case.image, case.text)]
    loss = with_prefixes(find_loss(name), SECTION, 6)

    def at(distance: float):
        pairs = case.pairs(0)
        return loss(replace(pairs, image=pairs.image + distance * along[0], text=pairs.text + distance * along[1]))

    here, step = at(0.0), 1e-6
    slope = (here.d_image * along[0]).sum() + (here.d_text * along[1]).sum()
    torch.testing.assert_close((at(step).loss - at(-step).loss) / (2 * step), slope, rtol=1e-5, atol=1e-7)


def test_accuracies_are_those_of_whole_features_and_half_precision_stays_close():
    case, options = Case("softmax", 1, 8, extras=False), OPTIONS["plain"]
    (result,), whole = ours(case, options), find_loss("softmax")(case.pairs(0))
    assert (result.correct_image, result.correct_text) == (whole.correct_image, whole.correct_text)
    half = Case("softmax", 1, 8, extras=False, dtype=torch.bfloat16)
    torch.testing.assert_close(ours(half, options)[0].loss.double(), result.loss, rtol=0.05, atol=0.0)


def test_without_prefixes_the_loss_is_the_one_that_was_found():
    assert with_prefixes(find_loss("softmax"), LossSection(), 6) is find_loss("softmax")


@pytest.mark.parametrize("dims", [[6], [3, 2], [2, 2], [2, 900]])
def test_what_is_no_prefix_is_refused(dims):
    with pytest.raises(UserError, match="ascending numbers below 6"):
        with_prefixes(find_loss("softmax"), LossSection(matryoshka_dims=dims), 6)


def test_prefixes_without_weights_count_as_the_whole_feature():
    case = Case("softmax", 1, 4, seed=3)
    [found] = ours(case, OPTIONS["plain"], LossSection(matryoshka_dims=DIMS))
    [weighted] = ours(case, OPTIONS["plain"], replace(SECTION, matryoshka_weights=[1.0, 1.0]))
    assert torch.equal(found.loss, weighted.loss) and torch.equal(found.d_image, weighted.d_image)
