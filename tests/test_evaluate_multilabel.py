"""Several classes an image: mean average precision against a loop in float64, and labels from .npy and .json."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.data import build_eval_dataset
from dsclip.errors import UserError
from dsclip.evaluate import Embedder, Options, run_task
from dsclip.evaluate.arguments import NEGATIVE_KEY, check_keys
from dsclip.evaluate.results.intervals import bootstrap, intervals
from dsclip.evaluate.tasks.multilabel import measure_multilabel
from dsclip.losses import SingleRank
from tests.shard_files import jpeg, write_tar
from tests.thread_ranks import ThreadRanks


def reference(logits, targets, counts) -> float:
    """Images as often as counts says; an image that is there twice stands at one place of the ranking."""
    found = []
    for scores, relevant in zip(logits.T.tolist(), targets.T.tolist(), strict=True):
        seen = right = total = 0.0
        for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
            seen += counts[i]
            right += counts[i] * relevant[i]
            total += counts[i] * relevant[i] * right / seen if counts[i] else 0
        if right:
            found.append(total / right)
    return sum(found) / len(found)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 12), classes=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_mean_average_precision_equals_a_loop_with_ties_absent_classes_and_resamples(n, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (n, classes), generator=generator).float()
    targets = torch.rand(n, classes, generator=generator) < 0.3
    targets[0, 0] = True
    outcomes = measure_multilabel(logits, targets).outcomes["mean_average_precision"]
    assert outcomes.value() == pytest.approx(reference(logits, targets, [1] * n))
    weights = torch.randint(0, 3, (n, 4), generator=generator).double()
    weights[0] += 1
    expected = [reference(logits, targets, column.tolist()) for column in weights.T]
    assert outcomes.statistic(weights, outcomes.units).tolist() == pytest.approx(expected)


class SeveralClasses:
    """Images and prompts are their own features: small integers, so that some are equal."""

    classes, templates, groups = ["a", "b", "c"], ["{}"], [None] * 7
    label_sets = [(0,), (1, 2), (), (0, 2), (1,), (2,), (0, 1)]
    generator = torch.Generator().manual_seed(5)
    pictures = torch.randint(-1, 2, (7, 3), generator=generator).float()

    def __len__(self):
        return 7

    def image(self, index):
        return self.pictures[index]


def test_neither_ranks_nor_batches_change_it():
    def run(group, batch_size):
        embedder = Embedder(
            lambda x: x,
            lambda x: x,
            lambda texts, _: torch.eye(3)[["abc".index(t) for t in texts]],
            group,
            1,
            batch_size,
        )
        return run_task("multilabel", embedder, SeveralClasses()).metrics

    whole = run(SingleRank(), 4)
    assert 0 < whole["mean_average_precision"] < 1 and run(SingleRank(), 3) == whole
    assert ThreadRanks(2).run(lambda group: run(group, 4)) == [whole, whole]


def test_its_interval_is_that_of_resamples_drawn_one_at_a_time():
    generator = torch.Generator().manual_seed(3)
    targets = torch.rand(60, 3, generator=generator) < 0.3
    logits = targets + torch.randn(60, 3, generator=generator)
    measured = measure_multilabel(logits, targets)
    draws = np.random.default_rng(1)
    drawn = [
        reference(logits, targets, np.bincount(draws.integers(0, 60, 60), minlength=60).tolist()) for _ in range(300)
    ]
    ours = bootstrap([measured.outcomes["mean_average_precision"]])[0]
    assert ours.std().item() == pytest.approx(np.std(drawn), rel=0.15)
    assert ours.mean().item() == pytest.approx(np.mean(drawn), abs=0.01)
    low, high = intervals(measured)["mean_average_precision"]
    assert low < measured.metrics["mean_average_precision"] < high


def npy(values) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(values))
    return stream.getvalue()


class Texts:
    """Class embeddings along the axes; an image's feature is its mean colour."""

    @staticmethod
    def encode(images):
        return torch.nn.functional.normalize(images.float().mean(dim=(2, 3)), dim=1)


def test_labels_come_from_npy_as_clip_benchmark_writes_them_and_from_json(tmp_path):
    write_tar(tmp_path / "0.tar", {
        "0": {"jpg": jpeg(0), "npy": npy([0, 1, 1])},
        "1": {"jpg": jpeg(1), "json": json.dumps({"labels": [2, 0]}).encode()},
        "2": {"jpg": jpeg(2), "npy": npy([0.0, 0.0, 0.0])},
        "3": {"jpg": jpeg(3), "npy": npy([[1]])},
        "4": {"jpg": jpeg(4), "npy": b"\x93NUMPY"},
        "5": {"jpg": jpeg(5), "json": json.dumps({"labels": ["cat"]}).encode()},
        "6": {"jpg": jpeg(6), "txt": b"a caption"},
    })  # fmt: skip
    dataset = build_eval_dataset(str(tmp_path / "0.tar"), image_size=16)
    assert dataset.label_sets == [(1, 2), (0, 2), (), None]
    assert dict(dataset.bad) == {"unreadable .npy": 2, "unreadable labels": 1}
    tokens = {"red": 0, "green": 1, "blue": 2}
    embedder = Embedder(
        Texts.encode, lambda t: torch.eye(3)[t[:, 0]], lambda texts, _: torch.tensor([[tokens[t]] for t in texts]), SingleRank(), 1, 2
    )  # fmt: skip
    found = run_task("multilabel", embedder, dataset, Options(classnames=list(tokens), templates=["{}"]))
    images = torch.stack([dataset.image(i) for i in range(3)])
    targets = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0]])
    assert found.metrics["mean_average_precision"] == pytest.approx(reference(Texts.encode(images), targets, [1] * 3))
    assert found.metrics["samples"] == 3 and found.metrics["classes_without_samples"] == 0
    with pytest.raises(UserError, match="a sample has class 2, but there are 2 class names"):
        run_task("multilabel", embedder, dataset, Options(classnames=["red", "green"], templates=["{}"]))
    with pytest.raises(UserError, match="no image has any of the classes"):
        measure_multilabel(torch.eye(3), torch.zeros(3, 3, dtype=torch.bool))


def test_an_array_of_objects_is_never_loaded(tmp_path):
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    write_tar(
        tmp_path / "0.tar", {"0": {"jpg": jpeg(0), "npy": stream.getvalue()}, "1": {"jpg": jpeg(1), "npy": npy([1])}}
    )
    assert dict(build_eval_dataset(str(tmp_path / "0.tar"), image_size=16).bad) == {"unreadable .npy": 1}


def test_groups_come_from_the_metadata_of_datacomps_shards(tmp_path):
    samples = {"0": [2, 7], "1": [0, 7], "2": [2, 9]}
    members = {key: {"jpg": jpeg(int(key)), "cls": b"0", "npy": npy(values)} for key, values in samples.items()}
    write_tar(tmp_path / "0.tar", members)
    groups = {
        key: build_eval_dataset(str(tmp_path / "0.tar"), image_size=16, group_key=key).groups
        for key in ("npy:0", "npy:1", "npy:2")
    }
    assert groups == {"npy:0": ["2", "0", "2"], "npy:1": ["7", "7", "9"], "npy:2": [None] * 3}


def test_a_group_of_metadata_has_all_digits_and_is_a_number(tmp_path):
    vectors = {
        "0": np.float64([1234567, 0.1]), "1": np.float64([1234568, np.nan]), "2": np.int64([2**62 + 1, -1]), "3": np.float32([1e6, 0.1]),
        "4": np.array([True, False]), "5": np.float16([np.inf, -0.0]),
    }  # fmt: skip
    write_tar(tmp_path / "0.tar", {k: {"jpg": jpeg(int(k)), "cls": b"0", "npy": npy(v)} for k, v in vectors.items()})
    first, second = (
        build_eval_dataset(str(tmp_path / "0.tar"), image_size=16, group_key=key).groups for key in ("npy:0", "npy:1")
    )
    assert first == ["1234567", "1234568", "4611686018427387905", "1000000", "1", None]
    assert second == ["0.1", None, "-1", "0.1", "0", "0"]


def test_a_group_key_that_is_no_place_in_metadata_is_said(tmp_path):
    write_tar(tmp_path / "0.tar", {"0": {"jpg": jpeg(0), "cls": b"0", "npy": npy([1])}})
    for key in ("npy:x", "npy:", "npy:-1"):
        with pytest.raises(UserError, match=f"group key '{key}' is no place in .npy; give npy: and a number"):
            build_eval_dataset(str(tmp_path / "0.tar"), image_size=16, group_key=key)
    dataset = build_eval_dataset(str(tmp_path / "0.tar"), image_size=16, group_key="npy:1")
    with pytest.raises(UserError, match="has the group key 'npy:1'; look into a sample's .npy"):
        check_keys(dataset, "0.tar", "npy:1", NEGATIVE_KEY)
