"""Hard negatives, hard positives and Winoground against loops in float64, with ties, groups, broken images and ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.data.decoding.sample import BadSample
from dsclip.errors import UserError
from dsclip.evaluate import Embedder, run_task
from dsclip.losses import SingleRank
from tests.thread_ranks import ThreadRanks

SIZE = 3


class Drawn:
    """Samples whose images and texts are their own features: small integers, so that many are equal."""

    def __init__(self, seed, samples, pairs=False, captions=(1, 3)):
        self.g, self.pairs, self.broken = torch.Generator().manual_seed(seed), pairs, {}
        self.directions: dict[str, torch.Tensor] = {}
        self.images = [self.direction() for _ in range(samples)]
        self.captions = [[self.text() for _ in range(1 if pairs else self.number(*captions))] for _ in range(samples)]
        self.negatives = [[self.text() for _ in range(self.number(0, 3))] for _ in range(samples)]
        if pairs:
            self.negatives = [self.captions[i + 1 - 2 * (i % 2)] for i in range(samples)]
        self.labels = [None] * samples
        self.groups = ["ab"[i // 2 % 2] for i in range(samples)]
        # Some samples are of the same image; pairs never are.
        self.first = [i if pairs or i < 2 or i % 3 else i - 2 for i in range(samples)]
        self.images = [self.images[i] for i in self.first]

    def __len__(self):
        return len(self.images)

    def direction(self):
        return torch.randint(-1, 2, (SIZE,), generator=self.g).float()

    def text(self):
        name = f"text {len(self.directions)}"
        self.directions[name] = self.direction()
        return name

    def number(self, least, most):
        return int(torch.randint(least, most + 1, (), generator=self.g))

    def image(self, index):
        if index in self.unusable:
            raise BadSample("undecodable image")
        return self.images[index]

    unusable = frozenset()

    def blank(self):
        return torch.zeros(SIZE)

    def same_images(self, in_any_box=False):
        return [i // 3 * 3 for i in range(len(self))] if in_any_box else self.first

    def tokenize(self, texts, _):
        return torch.stack([self.directions[t] for t in texts])

    def embedder(self, group=None, batch_size=4):
        return Embedder(lambda x: x, lambda x: x, self.tokenize, group or SingleRank(), 4, batch_size)

    def near(self, a, b):
        a, b = (self.directions[x] if isinstance(x, str) else self.images[x] for x in (a, b))
        return float(a.double() @ b.double())


def whole(data):
    return [i for i in range(len(data)) if data.first[i] not in data.unusable]


def hard_negatives_reference(data):
    won = {"accuracy": [], "accuracy_a": [], "accuracy_b": []}
    for i in whole(data):
        for own in data.captions[i]:
            for wrong in data.negatives[i]:
                for name in ("accuracy", f"accuracy_{data.groups[i]}"):
                    won[name].append(data.near(i, own) > data.near(i, wrong))
            if data.negatives[i] and any(len(negatives) > 1 for negatives in data.negatives):
                first = all(data.near(i, own) > data.near(i, wrong) for wrong in data.negatives[i])
                won.setdefault("precision@1", []).append(first)
    return {name: sum(v) / len(v) for name, v in won.items() if v}


def hard_positives_reference(data):
    found = {"image_text": [], "text_only": []}
    for i in whole(data):
        own, wrong = data.captions[i], data.negatives[i]
        if len(own) < 2 or not wrong:
            continue
        found["image_text"].append(all(data.near(i, c) > data.near(i, n) for c in own for n in wrong))
        found["text_only"].append(all(
            data.near(own[a], own[b]) > data.near(c, n) for a in range(len(own)) for b in range(len(own)) if a != b for c in own for n in wrong
        ))  # fmt: skip
    return {name: sum(v) / len(v) for name, v in found.items()}


def winoground_reference(data):
    text, image = [], []
    for i in range(0, len(data), 2):
        if not {i, i + 1} <= set(whole(data)):
            continue
        (c0,), (c1,) = data.captions[i], data.captions[i + 1]
        text.append(data.near(i, c0) > data.near(i, c1) and data.near(i + 1, c1) > data.near(i + 1, c0))
        image.append(data.near(i, c0) > data.near(i + 1, c0) and data.near(i + 1, c1) > data.near(i, c1))
    both = [a and b for a, b in zip(text, image, strict=True)]
    return {name: sum(v) / len(v) for name, v in (("text", text), ("image", image), ("group", both))}


REFERENCES = {
    "hard_negatives": (hard_negatives_reference, dict(samples=9)),
    "hard_positives": (hard_positives_reference, dict(samples=9, captions=(2, 3))),
    "winoground": (winoground_reference, dict(samples=12, pairs=True)),
}


@pytest.mark.parametrize("task", REFERENCES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), broken=st.booleans())
def test_each_task_equals_a_loop_with_ties_and_broken_images(task, seed, broken):
    reference, options = REFERENCES[task]
    data = Drawn(seed, **options)
    if not any(data.negatives[i] for i in whole(data) if i != 4):
        return
    data.unusable = frozenset({4}) if broken else frozenset()
    found = run_task(task, data.embedder(), data).metrics
    for name, value in reference(data).items():
        parts = len({data.groups[i] for i in whole(data) if data.negatives[i]}) > 1
        if name in found or parts:
            assert found[name] == pytest.approx(value), name


@pytest.mark.parametrize("task", REFERENCES)
def test_neither_ranks_nor_batches_change_a_number(task):
    data = Drawn(5, **REFERENCES[task][1])
    alone = run_task(task, data.embedder(batch_size=7), data).metrics
    for found in ThreadRanks(3).run(lambda group: run_task(task, data.embedder(group, 2), data).metrics):
        assert found == alone


def test_everything_equal_is_nothing_right():
    """A model that gives every image and text one feature: 0, where an argmax over (own, wrong) says 100 %."""
    data, pairs = Drawn(0, 8, captions=(2, 2)), Drawn(0, 8, pairs=True)
    for each in (data, pairs):
        each.images = [torch.ones(SIZE)] * 8
        each.directions = {name: torch.ones(SIZE) for name in each.directions}
    assert run_task("hard_negatives", data.embedder(), data).metrics["accuracy"] == 0
    positives = run_task("hard_positives", data.embedder(), data).metrics
    assert positives["image_text"] == positives["text_only"] == 0
    scores = run_task("winoground", pairs.embedder(), pairs).metrics
    assert scores["text"] == scores["image"] == scores["group"] == 0 and scores["samples"] == 4


@pytest.mark.parametrize("task", ["hard_negatives", "hard_positives"])
def test_samples_of_one_photograph_are_drawn_together_whatever_is_shown_of_it(task):
    data = Drawn(1, 9, captions=(2, 2))
    for outcomes in run_task(task, data.embedder(), data).outcomes.values():
        assert set(outcomes.units.tolist()) <= {0, 3, 6}


def test_what_a_set_lacks_is_said():
    data = Drawn(0, 6, captions=(1, 1))
    with pytest.raises(UserError, match="needs hard negatives and 2 captions an image"):
        run_task("hard_positives", data.embedder(), data)
    with pytest.raises(UserError, match="needs Winoground's pairs"):
        run_task("winoground", data.embedder(), data)
