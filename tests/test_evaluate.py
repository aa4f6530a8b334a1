"""Metrics against brute force, classifiers, and the same numbers for every number of ranks."""

import importlib
import json
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.create import create_model
from dsclip.data import build_eval_dataset, load_tokenizer
from dsclip.errors import UserError
from dsclip.evaluate import Embedder, Options, measure_classification, measure_retrieval, run_task
from dsclip.evaluate.features import AHEAD
from dsclip.evaluate.tasks.templates import load_classnames, load_templates, template_sets
from dsclip.evaluate.tasks.zeroshot import classifier, prompts
from dsclip.losses import SingleRank


def brute_force(image, text, owner) -> dict[str, float]:
    scores = (image @ text.T).tolist()
    images, captions = range(len(image)), range(len(text))
    result = {}
    for k in (1, 5, 10):
        if k <= len(text):
            found = [sorted(captions, key=lambda c: (-scores[i][c], c))[:k] for i in images]
            result[f"image_to_text_recall@{k}"] = sum(any(owner[c] == i for c in found[i]) for i in images) / len(image)
        if k <= len(image):
            found = [sorted(images, key=lambda i: (-scores[i][c], i))[:k] for c in captions]
            result[f"text_to_image_recall@{k}"] = sum(owner[c] in found[c] for c in captions) / len(text)
    return result


@pytest.mark.parametrize(
    "owner, message",
    [
        ([0, 0, 2], "1 of 3 images have no caption .the first is number 1"),
        ([0, 1, 3], "one of the 3 images for each of the 3 captions"),
        ([0, 1], "one of the 3 images for each of the 3 captions"),
    ],
)
def test_images_without_captions_are_refused_where_features_are_given(owner, message):
    with pytest.raises(UserError, match=message):
        measure_retrieval(torch.eye(3), torch.eye(3), torch.tensor(owner))


@settings(max_examples=60, deadline=None)
@given(images=st.integers(1, 14), extra=st.integers(0, 20), levels=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_recall_equals_brute_force_with_ties_and_several_captions(images, extra, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(images), torch.randint(0, images, (extra,), generator=generator)]).sort().values
    # Few integer levels in two dimensions: many exact ties.
    image = torch.randint(-levels, levels + 1, (images, 2), generator=generator).float()
    text = torch.randint(-levels, levels + 1, (len(owner), 2), generator=generator).float()
    metrics = measure_retrieval(image, text, owner).metrics
    expected = brute_force(image, text, owner.tolist())
    assert metrics.keys() - expected.keys() == {"images", "captions"}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value), name
    assert (metrics["images"], metrics["captions"]) == (images, len(owner))


def test_chunks_do_not_change_recall(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(23, 4, generator=generator), torch.randn(50, 4, generator=generator)
    owner = torch.arange(50) % 23
    whole = measure_retrieval(image, text, owner).metrics
    monkeypatch.setattr(importlib.import_module("dsclip.evaluate.tasks.retrieval"), "ROWS_AT_ONCE", 7)
    assert measure_retrieval(image, text, owner).metrics == whole


def test_classification_metrics_of_a_hand_made_case():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 5, 4, 3, 2, 1], [5, 4, 3, 2, 1, 0], [9, 4, 3, 2, 1, 0]])
    metrics = measure_classification(logits, torch.tensor([0, 1, 4, 5])).metrics
    assert metrics["top1"] == 0.5 and metrics["top5"] == 0.75
    assert metrics["mean_per_class_recall"] == 0.5
    balanced = measure_classification(torch.eye(6)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 2])).metrics
    assert balanced["top1"] == 0.75 and balanced["mean_per_class_recall"] == 0.5


def test_a_classifier_averages_unit_embeddings_over_templates(demo):
    tokenizer = load_tokenizer("demo")
    model = create_model("demo", vocab_size=tokenizer.vocab_size, eot_token_id=tokenizer.eot_token_id)
    names, templates = ["red ring", "blue star", "green cross"], ["a {}", "there is a {}"]
    with torch.no_grad():
        embedder = Embedder(Constant(), lambda t: model(None, t)[1], tokenizer, SingleRank(), 32, batch_size=4)
        ours = classifier(embedder.texts(prompts(names, templates)), len(names))
        for name, row in zip(names, ours, strict=True):
            each = model(None, tokenizer([t.replace("{}", name) for t in templates], 32))[1]
            mean = each.double().mean(dim=0)
            torch.testing.assert_close(row.double(), mean / mean.norm(), atol=1e-6, rtol=1e-6)


def test_the_published_template_sets_are_whole():
    sets = template_sets()
    assert len(set(sets["openai"])) == 80 and len(set(sets["cifar"])) == 18 and len(sets) == 32
    assert all(
        t.count("{}") == 1 and len(set(templates)) == len(templates) for templates in sets.values() for t in templates
    )
    assert load_templates("openai") == sets["openai"] and load_templates("food101") == [
        "a photo of {}, a type of food."
    ]
    assert load_templates(["one {c}"]) == ["one {}"]


def test_names_and_templates_come_from_files_too(tmp_path):
    (tmp_path / "names.txt").write_text("sea lion\n\ncat \n")
    (tmp_path / "templates.txt").write_text("one {}\n")
    assert load_classnames(str(tmp_path / "names.txt")) == ["sea lion", "cat"]
    assert load_templates(str(tmp_path / "templates.txt")) == ["one {}"]
    (tmp_path / "names.txt").write_bytes("\ufeffSeelöwe\n".encode())
    assert load_classnames(str(tmp_path / "names.txt")) == ["Seelöwe"], "without the mark that some editors begin with"
    (tmp_path / "names.txt").write_bytes("Seelöwe\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"names\.txt is not UTF-8"):
        load_classnames(str(tmp_path / "names.txt"))
    with pytest.raises(UserError, match="is no file"):
        load_templates("openay")
    with pytest.raises(UserError, match="has no {} where"):
        load_templates(["a photo"])


class Constant:
    """An encoder that gives every input the same embedding."""

    def __call__(self, batch):
        return torch.ones(len(batch), 4) / 2


def test_missing_labels_and_names_are_explained(demo):
    tokenizer, dataset = load_tokenizer("demo"), build_eval_dataset("demo:val", image_size=64, max_samples=8)
    embedder = Embedder(Constant(), Constant(), tokenizer, SingleRank(), context_length=32, batch_size=4)
    with pytest.raises(UserError, match="there are 2 class names"):
        run_task("zeroshot", embedder, dataset, Options(classnames=["a", "b"]))
    dataset.classes = None
    with pytest.raises(UserError, match="needs class names"):
        run_task("zeroshot", embedder, dataset)


def test_metrics_are_json(demo):
    tokenizer, dataset = load_tokenizer("demo"), build_eval_dataset("demo:val", image_size=64, max_samples=8)
    embedder = Embedder(Constant(), Constant(), tokenizer, SingleRank(), 32, batch_size=3)
    metrics = run_task("zeroshot", embedder, dataset).metrics
    assert json.loads(json.dumps(metrics))["samples"] == 4


class Counted:
    """Images that are counted while they are alive."""

    def __init__(self, images):
        self.images, self.broken, self.alive, self.most, self.lock = images, {}, 0, 0, threading.Lock()

    def image(self, index):
        image = torch.full((3, 8, 8), index % 256, dtype=torch.uint8)
        with self.lock:
            self.alive += 1
            self.most = max(self.most, self.alive)
        weakref.finalize(image, self._gone)
        return image

    def _gone(self):
        with self.lock:
            self.alive -= 1


def test_no_more_than_a_few_batches_of_images_are_decoded_ahead():
    """Whatever their number: these are 50 batches."""
    dataset = Counted(200)
    embedder = Embedder(lambda images: images[:, 0, 0, :1].float(), Constant(), None, SingleRank(), 32, batch_size=4)
    features, indices = embedder.images(dataset, list(range(200)))
    assert features[:, 0].tolist() == indices == list(range(200))
    assert dataset.most <= 4 * (AHEAD + 2)


class WrittenByHand:
    """Three images; the second has no hard negative. Images and captions are their own features."""

    captions = [["east", "east again"], ["north"], ["west"]]
    negatives = [["north", "west"], [], ["south"]]
    groups = [None, None, None]
    directions = {"east": (1, 0), "east again": (1, 0), "north": (0, 1), "west": (-1, 0), "south": (0, -1)}

    def image(self, index):
        return torch.tensor([(1.0, 0.0), (0.0, 1.0), (0.6, -0.8)][index])

    def same_images(self, in_any_box=False):
        return [0, 1, 2]

    @classmethod
    def tokenize(cls, texts, _):
        return torch.tensor([cls.directions[t] for t in texts], dtype=torch.float32)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_hard_negatives_count_pairs_of_the_same_image(batch_size):
    """The first image wins all four pairs; the third looks south-east, so that its own caption `west` loses."""
    embedder = Embedder(lambda x: x, lambda x: x, WrittenByHand.tokenize, SingleRank(), 4, batch_size)
    found = {"accuracy": 4 / 5, "images": 2, "pairs": 5}
    assert run_task("hard_negatives", embedder, WrittenByHand(), Options(brief=True)).metrics == found
    found["precision@1"] = 2 / 3  # two of three own captions win against all
    assert run_task("hard_negatives", embedder, WrittenByHand()).metrics == pytest.approx(found)
