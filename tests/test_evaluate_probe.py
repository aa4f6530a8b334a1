"""Linear probes, k nearest neighbours and calibration, against conditions and loops in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.errors import UserError
from dsclip.evaluate import Embedder, Options, measure_classification, run_task
from dsclip.evaluate.tasks.knn import TEMPERATURE, knn_votes
from dsclip.evaluate.tasks.logistic import FITS, MOST_FITS, STRENGTHS, fit_adamw, fit_lbfgs, search_strength
from dsclip.evaluate.tasks.probe import places_in_class
from dsclip.evaluate.tasks.zeroshot import calibration_error
from dsclip.losses import SingleRank
from tests.thread_ranks import ThreadRanks


def features(seed, n, classes=3, d=4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.eye(classes, d)
    x = centres[labels] + 0.35 * torch.randn(n, d, generator=generator)
    return torch.nn.functional.normalize(x, dim=1), labels


@pytest.mark.parametrize("strength", [1e-5, 1e-2, 1.0])
def test_lbfgs_ends_where_every_gradient_is_zero(strength):
    """The problem is convex: that is the minimum. Gradients by their formula, not by autograd."""
    x, y = features(0, 90)
    fitted = fit_lbfgs(x, y, 3, strength)
    weights = fitted(torch.eye(4)) - fitted(torch.zeros(4, 4))
    off = (fitted(x).softmax(dim=1) - torch.nn.functional.one_hot(y, 3)) / 90
    assert (x.double().T @ off + strength * weights).abs().max() < 2e-6
    assert off.sum(dim=0).abs().max() < 2e-6 and fitted(x).dtype == torch.float64


def test_adamw_is_the_same_every_time_and_leaves_the_random_numbers_alone():
    x, y = features(1, 100)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    logits = [fit_adamw(x, y, 3, 1e-4)(x) for _ in range(2)]
    assert torch.equal(*logits) and torch.equal(torch.random.get_rng_state(), before)
    assert (logits[0].argmax(dim=1) == y).double().mean() > 0.8


@pytest.mark.parametrize("peak", [0, 1, 15, 16, 50, 95, 96])
def test_the_search_finds_a_single_peak_in_few_fits(peak):
    asked = []

    def accuracy(strength):
        asked.append(strength)
        return 1 / (1 + abs(STRENGTHS.index(strength) - peak))

    assert search_strength(accuracy) == STRENGTHS[peak] and len(asked) == len(set(asked)) <= MOST_FITS


def test_places_count_within_a_class():
    assert places_in_class(torch.tensor([2, 0, 2, 2, 0, 1])).tolist() == [0, 0, 1, 2, 1, 0]


class Labelled:
    """Samples whose images are their own features."""

    def __init__(self, seed, n, classes=3, first=None):
        self.features, labels = features(seed, n, classes)
        if first is not None:
            self.features[0] = first
        self.labels = labels.tolist()
        self.broken, self.groups = {}, [None] * n

    def image(self, index):
        return self.features[index]

    def embedder(self, group=None, batch_size=4):
        return Embedder(
            lambda x: x, lambda x: x, lambda texts, _: torch.zeros(len(texts), 4), group or SingleRank(), 4, batch_size
        )


def test_a_probe_learns_and_is_the_same_for_any_ranks_and_batches():
    train, test = Labelled(2, 120), Labelled(3, 60)
    for options in (
        Options(train=train),
        Options(train=train, validation=Labelled(4, 30)),
        Options(train=train, shots=(1, 8), seeds=2),
    ):
        alone = run_task("linear_probe", test.embedder(batch_size=7), test, options)
        for found in ThreadRanks(2).run(
            lambda group, o=options: run_task("linear_probe", test.embedder(group, 5), test, o)
        ):
            assert found.metrics == alone.metrics
        metrics = alone.metrics
        assert metrics["samples"] == 60 and metrics["classes"] == 3
        if options.shots:
            assert {"top1_1shot", "top1_8shot", "mean_per_class_recall_8shot", "top1_8shot_deviation"} <= metrics.keys()
            assert 0.4 < metrics["top1_1shot"] < metrics["top1_8shot"] and metrics["top1_8shot"] > 0.7
            assert set(alone.outcomes["top1_8shot"].values.tolist()) <= {0, 0.5, 1}, "each sample's mean over two draws"
        else:
            assert metrics["top1"] > 0.75 and metrics["regularisation"] in STRENGTHS


def test_the_probe_is_fitted_by_the_solver_that_is_asked_for_with_the_best_strength():
    train, validation, test = Labelled(5, 60), Labelled(6, 40), Labelled(7, 50)
    y = [torch.tensor(each.labels) for each in (train, validation, test)]
    for solver, fit in FITS.items():
        strength = search_strength(
            lambda s, f=fit: (
                (f(train.features, y[0], 3, s)(validation.features).argmax(1) == y[1]).double().mean().item()
            )
        )
        both = torch.cat([train.features, validation.features]), torch.cat(y[:2])
        expected = (fit(*both, 3, strength)(test.features).argmax(1) == y[2]).double().mean().item()
        found = run_task(
            "linear_probe", test.embedder(), test, Options(train=train, validation=validation, solver=solver)
        )
        assert found.metrics["top1"] == pytest.approx(expected) and found.metrics["regularisation"] == strength


@pytest.mark.parametrize(
    "options, fitted_on, tried_on",
    [
        (dict(), [48, 60], 12),  # every fifth of 20 a class decides, and all train in the end
        (dict(validation=9), [60, 69], 9),
        (dict(shots=(2,)), [6, 6], 6),
        (dict(shots=(6,)), [18, 18], 12),  # four more of each class
        (dict(shots=(6,), validation=9), [18, 18], 9),
    ],
)
def test_which_samples_a_probe_is_fitted_and_its_strength_is_chosen_on(monkeypatch, options, fitted_on, tried_on):
    fits, tries = [], []

    def fit(x, y, classes, strength):
        assert y.bincount().unique().numel() == 1, "as many of each class"
        fits.append(len(x))
        return lambda seen: tries.append(len(seen)) or torch.zeros(len(seen), classes)

    monkeypatch.setitem(FITS, "lbfgs", fit)
    if "validation" in options:
        options = options | {"validation": Labelled(4, options["validation"])}
    test, said = Labelled(3, 15), []
    embedder = replace(test.embedder(), fitted=lambda done, of: said.append((done, of)))
    run_task("linear_probe", embedder, test, Options(train=Labelled(2, 60), seeds=1, **options))
    assert [done for done, _ in said] == list(range(1, len(fits) + 1)) and {of for _, of in said} == {MOST_FITS + 1}
    assert len(fits) <= MOST_FITS + 1
    assert [fits[0], fits[-1]] == fitted_on and set(fits[:-1]) == {fitted_on[0]}
    assert set(tries[:-1]) == {tried_on} and tries[-1] == 15


def test_what_a_probe_lacks_is_said():
    test = Labelled(0, 12)
    for options, message in (
        (Options(), "needs training samples"),
        (Options(train=Labelled(1, 9), shots=(4,)), "a class has fewer than 4 training samples"),
        (Options(train=Labelled(1, 9), shots=(3,)), "no class has training samples to spare"),
        (Options(train=Labelled(1, 9), solver="sgd"), "solver 'sgd' is none of lbfgs, adamw"),
    ):
        with pytest.raises(UserError, match=message):
            run_task("linear_probe", test.embedder(), test, options)
    with pytest.raises(UserError, match="20 neighbours of 9 training samples"):
        run_task("knn", test.embedder(), test, Options(train=Labelled(1, 9)))


def knn_reference(train, labels, test, k, classes):
    votes = [[0.0] * classes for _ in test]
    for i, x in enumerate(test):
        near = [float(x.double() @ t.double()) for t in train]
        for j in sorted(range(len(train)), key=lambda j: (-near[j], j))[:k]:
            votes[i][int(labels[j])] += math.exp(near[j] / TEMPERATURE)
    return votes


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 12), m=st.integers(1, 4), k=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_neighbours_vote_as_in_a_loop_with_ties(n, m, k, seed):
    generator = torch.Generator().manual_seed(seed)
    train, test = (torch.randint(-1, 2, (rows, 2), generator=generator).float() / 8 for rows in (n, m))
    labels = torch.randint(0, 3, (n,), generator=generator)
    votes = knn_votes(train, labels, test, min(k, n), 3)
    assert votes.tolist() == [pytest.approx(row) for row in knn_reference(train, labels, test, min(k, n), 3)]


def test_knn_is_the_same_for_any_ranks_and_batches():
    train, test = Labelled(2, 120), Labelled(3, 60)
    alone = run_task("knn", test.embedder(), test, Options(train=train)).metrics
    for found in ThreadRanks(3).run(lambda group: run_task("knn", test.embedder(group, 9), test, Options(train=train))):
        assert found.metrics == alone and alone["top1"] > 0.7


def calibration_reference(probabilities, labels, bins=15):
    """Guo et al. 2017: sum over bins of |B| / n · |accuracy − confidence|."""
    total = 0.0
    rows = [(max(p), p.index(max(p)) == y) for p, y in zip(probabilities, labels, strict=True)]
    for b in range(bins):
        inside = [(c, hit) for c, hit in rows if b / bins < c <= (b + 1) / bins]
        if inside:
            accuracy, confidence = (sum(r[k] for r in inside) / len(inside) for k in (1, 0))
            total += len(inside) / len(rows) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_calibration_error_equals_its_definition(scale):
    x, y = features(4, 200, classes=4)
    logits = scale * x
    expected = calibration_reference(logits.double().softmax(dim=1).tolist(), y.tolist())
    assert calibration_error(logits, y).value() == pytest.approx(expected, abs=1e-12)


def test_among_equal_logits_the_lower_class_comes_first():
    logits = torch.zeros(6, 6)
    found = measure_classification(logits, torch.arange(6))
    assert found.outcomes["top1"].values.tolist() == [1, 0, 0, 0, 0, 0]
    assert found.outcomes["top5"].values.tolist() == [1, 1, 1, 1, 1, 0]
