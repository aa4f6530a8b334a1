"""WinoGAViL's associations and macro F1 against the definitions, in sets and loops, and DataComp's numbers of candidates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.errors import UserError
from dsclip.evaluate import run_task
from dsclip.evaluate.results.intervals import bootstrap
from dsclip.evaluate.results.result import macro_f1
from dsclip.evaluate.tasks.associations import prompt
from tests.test_evaluate_compositional import Drawn
from tests.thread_ranks import ThreadRanks


class Cues(Drawn):
    """Cues with candidates, some of them pictures of other cues; features are small integers, so that many are equal."""

    def __init__(self, seed, sizes):
        super().__init__(seed, sum(sizes))
        self.cues = True
        self.groups = [str(c) for c, size in enumerate(sizes) for _ in range(size)]
        self.labels = [int(i == 0 or self.number(0, 1)) for size in sizes for i in range(size)]
        words = [f"{'aeious'[c % 6]}Word {c}" for c in range(len(sizes))]
        self.captions = [[words[int(group)]] for group in self.groups]
        self.directions |= {prompt(word): self.direction() for word in words}

    def near(self, a, b):
        return float(self.images[a].double() @ self.directions[prompt(b)].double())


def reference(data):
    """{metric: mean}, with sets of candidates as the paper writes it."""
    found = {}
    for cue in dict.fromkeys(data.groups):
        rows = [i for i, group in enumerate(data.groups) if group == cue]
        if any(data.first[i] in data.unusable for i in rows):
            continue
        own = {i for i in rows if data.labels[i]}
        ranked = sorted(rows, key=lambda i: (-data.near(i, data.captions[i][0]), i))
        taken = set(ranked[: len(own)])
        score = len(own & taken) / len(own | taken)
        names = [
            "jaccard",
            *(["jaccard_5-6"] if len(rows) <= 6 else []),
            *(["jaccard_10-12"] if len(rows) >= 10 else []),
        ]
        for name in names:
            found.setdefault(name, []).append(score)
    return {name: sum(scores) / len(scores) for name, scores in found.items()}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.sampled_from([5, 6, 10, 12]), min_size=1, max_size=5),
    broken=st.booleans(),
)
def test_associations_equal_sets_with_ties_and_broken_images(seed, sizes, broken):
    data = Cues(seed, [*sizes, 5])
    if broken:
        data.unusable = frozenset({data.first[0]})
    expected = reference(data)
    if not expected:
        with pytest.raises(UserError, match="no cue has all its candidates"):
            run_task("associations", data.embedder(), data)
        return
    metrics = run_task("associations", data.embedder(), data).metrics
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert {name for name in metrics if name in ("jaccard_5-6", "jaccard_10-12")} == set(expected) - {"jaccard"}


def test_neither_ranks_nor_batches_change_a_number():
    data = Cues(3, [5, 6, 10])
    whole = run_task("associations", data.embedder(), data).metrics
    assert run_task("associations", data.embedder(batch_size=3), data).metrics == whole
    ranks = ThreadRanks(2).run(lambda group: run_task("associations", data.embedder(group), data).metrics)
    assert ranks == [whole, whole]


def test_the_sentence_is_winogavils():
    assert [prompt(cue) for cue in ("Orange", "wet", "UFO", "hour")] == ["An orange", "A wet", "An ufo", "A hour"]


def test_a_set_without_cues_is_one_sentence():
    with pytest.raises(UserError, match="this task needs cues with candidates"):
        data = Drawn(0, 3)
        data.cues = False
        run_task("associations", data.embedder(), data)


def f1_in_loops(predicted, labels):
    scores = []
    for c in sorted(set(labels)):
        hits = sum(p == c == t for p, t in zip(predicted, labels, strict=True))
        precision = hits / max(1, predicted.count(c))
        recall = hits / labels.count(c)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


def test_macro_f1_of_a_hand_made_case():
    """Class 0: precision 1, recall 1/2; class 1: the same; class 2 is only predicted and doesn't count: WILDS' labels=unique(y_true)."""
    found = macro_f1(torch.tensor([0, 2, 1, 2]), torch.tensor([0, 0, 1, 1]))
    assert found.value() == pytest.approx(2 / 3)
    assert macro_f1(torch.tensor([1, 1]), torch.tensor([0, 0])).value() == 0


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_macro_f1_equals_loops_also_in_resamples(rows, seed):
    predicted, labels = (list(column) for column in zip(*rows, strict=True))
    found = macro_f1(torch.tensor(predicted), torch.tensor(labels))
    assert found.value() == pytest.approx(f1_in_loops(predicted, labels))
    drawn = torch.randint(len(rows), (len(rows),), generator=torch.Generator().manual_seed(seed))
    weights = torch.bincount(drawn, minlength=len(rows)).double()[:, None]
    again = f1_in_loops([predicted[i] for i in drawn], [labels[i] for i in drawn])
    assert found.statistic(weights, found.units).item() == pytest.approx(again)


def test_macro_f1_has_an_interval_in_which_rare_classes_may_be_absent():
    found = macro_f1(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 3]))
    assert bootstrap([found]).isfinite().all()
