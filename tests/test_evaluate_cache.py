"""Cache classifiers against loops in float64, and what they add to zero-shot."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.errors import UserError
from dsclip.evaluate import Embedder, Options, run_task
from dsclip.evaluate.tasks import cache
from dsclip.evaluate.tasks.cache import cache_votes, divergences, representative
from dsclip.losses import SingleRank
from tests.test_evaluate_probe import Labelled
from tests.thread_ranks import ThreadRanks


def unit(seed, n, d=5):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1)


def softmax(logits):
    powers = [math.exp(x) for x in logits]
    return [p / sum(powers) for p in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def dot(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 4), st.floats(0, 8))
def test_votes_equal_both_papers_formulas_entry_by_entry(seed, keys, classes, sharpness):
    test, key, weights = unit(seed, 4), unit(seed + 1, keys), unit(seed + 2, classes)
    of_class = torch.randint(classes, (keys,), generator=torch.Generator().manual_seed(seed))
    p, q = ([softmax([10 * dot(x, w) for w in weights]) for x in part] for part in (test, key))
    logs = tuple(torch.tensor(x, dtype=torch.float64).log() for x in (p, q))
    tip, tfup = torch.zeros(2, 4, classes, dtype=torch.float64)
    for i in range(4):
        apart = [kl(p[i], q[j]) for j in range(keys)]
        for j in range(keys):
            way = (apart[j] - min(apart)) / (max(apart) - min(apart)) if max(apart) - min(apart) > 1e-12 else None
            similarity = dot(test[i], key[j])
            tip[i, of_class[j]] += math.exp(-sharpness * (1 - similarity))
            if way is not None:
                tfup[i, of_class[j]] += math.exp(-sharpness * (1 - similarity * 2 * (1 - way)))
    assert cache_votes(test, key, of_class, classes, sharpness) == pytest.approx(tip, rel=1e-9)
    if keys > 1 and classes > 1:
        assert cache_votes(test, key, of_class, classes, sharpness, logs) == pytest.approx(tfup, rel=1e-6)


def test_votes_are_the_same_in_one_block_and_in_many(monkeypatch):
    test, key, of_class = unit(0, 30), unit(1, 12), torch.arange(12) % 3
    logs = (test.log_softmax(1), key.log_softmax(1))
    whole = cache_votes(test, key, of_class, 3, 2.0, logs)
    monkeypatch.setattr(cache, "ROWS_AT_ONCE", 7)
    assert cache_votes(test, key, of_class, 3, 2.0, logs) == pytest.approx(whole, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 4))
def test_representatives_are_confident_and_typical(seed, n, most):
    p = (3 * unit(seed, n, 3)).log_softmax(dim=1)
    chosen, of_class = representative(p, most)
    expected = []
    for c in range(3):
        confident = sorted(range(n), key=lambda i: (-p[i, c].item(), i))[: 2 * most]
        rows = p.exp().tolist()
        apart = {i: sum(kl(rows[i], rows[j]) for j in confident) for i in confident}
        expected += [(i, c) for i in sorted(confident, key=lambda i: (round(apart[i], 10), confident.index(i)))[:most]]
    assert list(zip(chosen.tolist(), of_class.tolist(), strict=True)) == expected
    assert divergences(p, p).diagonal().abs().max() < 1e-12


class WithPrompts(Labelled):
    """Sets of three classes whose prompts' features are turned away from the classes' centres."""

    classes, templates = ["0", "1", "2"], ["{}"]

    def embedder(self, group=None, batch_size=4):
        names = torch.nn.functional.normalize(torch.eye(3, 4) + 0.9 * torch.eye(3, 4).roll(1, dims=0), dim=1)
        return Embedder(
            lambda x: x, lambda x: x, lambda texts, _: names[[int(t[0]) for t in texts]], group or SingleRank(), 4, batch_size
        )  # fmt: skip

    def __len__(self):
        return len(self.labels)


@pytest.mark.parametrize("task", ["tip_adapter", "tfup"])
def test_a_cache_adds_to_zero_shot_on_any_ranks_and_without_weight_it_adds_nothing(task):
    train, test = WithPrompts(2, 120), WithPrompts(3, 90)
    # The tasks' own shares are for logits of scale 100; here the cache weighs as much as the text.
    options = Options(
        train=train,
        logit_scale=2.0,
        cache_weight=1.0,
        cache_sharpness=3.0,
        **({"shots": (4,)} if task == "tip_adapter" else {}),
    )
    alone = run_task(task, test.embedder(batch_size=7), test, options).metrics
    main = next(iter(alone))
    assert main == ("top1_4shot" if task == "tip_adapter" else "top1")
    assert alone[main] > alone["top1_zeroshot"] + 0.03
    for found in ThreadRanks(2).run(lambda group: run_task(task, test.embedder(group, 5), test, options)):
        assert found.metrics == alone
    nothing = Options(train=train, logit_scale=2.0, cache_weight=0.0)
    assert run_task(task, test.embedder(), test, nothing).outcomes
    plain = run_task(task, test.embedder(), test, nothing).metrics
    zeroshot = run_task("zeroshot", test.embedder(), test).metrics["top1"]
    assert plain[next(iter(plain))] == plain["top1_zeroshot"] == zeroshot


def test_labels_of_the_training_set_are_read_by_tip_adapter_alone():
    train, test = WithPrompts(2, 120), WithPrompts(3, 60)
    unlabelled = WithPrompts(2, 120)
    unlabelled.labels = [None] * 120
    options = [Options(train=each) for each in (train, unlabelled)]
    found = [run_task("tfup", test.embedder(), test, each).metrics for each in options]
    assert found[0] == found[1] and found[0]["cached_per_class"] == 12
    with pytest.raises(UserError, match="needs labels"):
        run_task("tip_adapter", test.embedder(), test, options[1])


def test_too_many_shots_are_a_sentence():
    test = WithPrompts(3, 60)
    with pytest.raises(UserError, match="a class has fewer than 50 training samples"):
        run_task("tip_adapter", test.embedder(), test, Options(train=WithPrompts(2, 120), shots=(50,)))
