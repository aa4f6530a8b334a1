"""Classifiers without training: zero-shot logits plus votes of cached training images, with labels (Tip-Adapter) or without (TFUP).

Sources: Zhang et al. 2022 (Tip-Adapter), equations 3 to 6; Long et al. 2024 (TFUP) and its code for what the paper leaves open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.evaluate.results.result import Measured, Outcomes
from dsclip.evaluate.tasks.probe import labelled_training, shuffled_places
from dsclip.evaluate.tasks.task import Embedded, Images, Options, TaskKind, lines_sha256
from dsclip.evaluate.tasks.zeroshot import (
    classifier,
    measure_classification,
    prompt_protocol,
    prompts,
    zeroshot_prompts,
    zeroshot_samples,
)

LOGIT_SCALE = 100.0  # CLIP's, for models that don't say theirs
SHOTS = (16,)
TIP_ADAPTER_CACHE = (1.0, 5.5)  # weight and sharpness of the votes, alpha and beta of the paper
TFUP_CACHE = (0.3, 1.0)
TFUP_SCALE = 10.0  # of the similarities that images are chosen by and compared in
TFUP_SHARE, TFUP_LEAST, TFUP_MOST = 0.3, 9, 16  # cached images a class: this share of the images, within bounds
ROWS_AT_ONCE = 256  # of the similarities to all cached images


class _Cached:
    """What both have in common: prompts, a training set, and how votes are added."""

    def __init__(self, dataset: EvalDataset, options: Options, default: tuple[float, float]):
        self._names, templates = zeroshot_prompts(dataset, options.classnames, options.templates)
        self._train, self._test = labelled_training(options), dataset
        self._scale = options.logit_scale or LOGIT_SCALE
        self._weight = default[0] if options.cache_weight is None else options.cache_weight
        self._sharpness = default[1] if options.cache_sharpness is None else options.cache_sharpness
        self.texts = prompts(self._names, templates)
        self.protocol: dict[str, Any] = {
            **prompt_protocol(self._names, templates), "cache_weight": self._weight, "cache_sharpness": self._sharpness,
            "logit_scale": self._scale,
        }  # fmt: skip

    def _parts(self, images: Sequence[Embedded], text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(training features, then in float64 test and class features and zero-shot logits, test labels)."""
        (train, _), (test, of_test) = images
        weights = classifier(text, len(self._names)).double()
        labels = torch.tensor([self._test.labels[i] for i in of_test])
        return train, test.double(), weights, self._scale * (test.double() @ weights.T), labels


class TipAdapter(_Cached):
    """`top1_16shot`, … for each number of shots, the mean over draws, beside `top1_zeroshot`; equal logits as in zero-shot.

    The draws are those of the linear probe; weight and sharpness aren't searched.
    """

    def __init__(self, dataset: EvalDataset, options: Options):
        super().__init__(dataset, options, TIP_ADAPTER_CACHE)
        classes = len(self._names)
        self._shots, self._seeds = options.shots or SHOTS, range(options.seeds)
        samples = zeroshot_samples(self._train, classes)
        self.images = (Images(self._train, samples), Images(dataset, zeroshot_samples(dataset, classes)))
        self.protocol |= {
            "shots": list(self._shots), "seeds": options.seeds,
            "train_labels_sha256": lines_sha256([str(label) for label in self._train.labels]),
        }  # fmt: skip

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """{"top1_16shot", …, "top1_zeroshot", "samples", "classes"}."""
        train, test, weights, zeroshot, labels = self._parts(images, text)
        of_train = torch.tensor([self._train.labels[i] for i in images[0].indices])
        outcomes: dict[str, Outcomes] = {}
        for shots in self._shots:
            draws = []
            for seed in self._seeds:
                order, place = shuffled_places(of_train, len(weights), shots, seed)
                keys = order[place < shots]
                votes = cache_votes(test, train[keys].double(), of_train[keys], len(weights), self._sharpness)
                draws.append(measure_classification(zeroshot + self._weight * votes, labels).outcomes)
            for name, found in draws[0].items():
                values = torch.stack([draw[name].values for draw in draws]).mean(dim=0)
                outcomes[f"{name}_{shots}shot"] = replace(found, values=values)
        return _beside_zeroshot(outcomes, zeroshot, labels, {}).of_samples(images[-1].indices)


class Tfup(_Cached):
    """`top1`, `top5` and `mean_per_class_recall` beside `top1_zeroshot`, from training images whose labels aren't looked at."""

    def __init__(self, dataset: EvalDataset, options: Options):
        super().__init__(dataset, options, TFUP_CACHE)
        self.images = (
            Images(self._train, list(range(len(self._train)))), Images(dataset, zeroshot_samples(dataset, len(self._names)))
        )  # fmt: skip

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """{"top1", …, "top1_zeroshot", "samples", "classes", "cached_per_class"}."""
        train, test, weights, zeroshot, labels = self._parts(images, text)
        most = min(TFUP_MOST, max(TFUP_LEAST, int(len(train) * TFUP_SHARE / len(weights))))
        of_train, of_test = ((TFUP_SCALE * (x @ weights.T)).log_softmax(dim=1) for x in (train.double(), test))
        chosen, of_class = representative(of_train, most)
        votes = cache_votes(
            test, train[chosen].double(), of_class, len(weights), self._sharpness, (of_test, of_train[chosen])
        )
        found = measure_classification(zeroshot + self._weight * votes, labels)
        counts = {"cached_per_class": len(chosen) // len(weights)}
        return _beside_zeroshot(dict(found.outcomes), zeroshot, labels, counts).of_samples(images[-1].indices)


READS = ("classnames", "templates", "train", "cache_weight", "cache_sharpness")
TIP_ADAPTER = TaskKind("tip_adapter", TipAdapter, reads=(*READS, "shots", "seeds"))
TFUP = TaskKind("tfup", Tfup, reads=READS, reads_labels=False)


def cache_votes(
    test: Tensor, keys: Tensor, of_class: Tensor, classes: int, sharpness: float,
    log_probabilities: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """[n, classes]: votes exp(-sharpness * (1 - affinity)) of keys [m, d], unit rows of classes [m], for test [n, d].

    The affinity is the similarity; with log_probabilities of classes, of the test's [n, C] and of the keys' images [m, C], times
    2 * (1 - k), k the divergence KL(test || key) as a share of the way from a test image's nearest key to its farthest.
    """
    label = F.one_hot(of_class, classes).to(test)
    votes = []
    for start in range(0, len(test), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        affinity = test[rows] @ keys.T
        if log_probabilities is not None:
            affinity = affinity * semantic_similarity(log_probabilities[0][rows], log_probabilities[1])
        votes.append((-sharpness * (1 - affinity)).exp() @ label)
    return torch.cat(votes)


def semantic_similarity(test: Tensor, keys: Tensor) -> Tensor:
    """[n, m] in 0..2 of log probabilities [n, C] and [m, C]: 2 at the key of the smallest KL(test || key), 0 at that of the largest."""
    divergence = divergences(test, keys)
    least, most = divergence.amin(dim=1, keepdim=True), divergence.amax(dim=1, keepdim=True)
    way = (divergence - least) / torch.where(most > least, most - least, 1)
    return 2 * (1 - way)


def divergences(p: Tensor, q: Tensor) -> Tensor:
    """[n, m]: KL(p || q) of log probabilities p [n, C] and q [m, C]."""
    return (p.exp() * p).sum(dim=1, keepdim=True) - p.exp() @ q.T


def representative(log_probabilities: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(images [k], the class that each stands for [k]) of log probabilities [n, C]; an image may stand for several classes.

    For each class, of the 2 * most images most confident of it, those that are nearest to all of them: with the smallest sums of
    KL(own || other). Among equals the first in the set counts.
    """
    chosen, of_class = [], []
    for number in range(log_probabilities.shape[1]):
        confident = log_probabilities[:, number].argsort(descending=True, stable=True)[: 2 * most]
        among = log_probabilities[confident]
        typical = divergences(among, among).sum(dim=1).argsort(stable=True)[:most]
        chosen.append(confident[typical])
        of_class.append(torch.full_like(typical, number))
    return torch.cat(chosen), torch.cat(of_class)


def _beside_zeroshot(
    outcomes: dict[str, Outcomes], zeroshot: Tensor, labels: Tensor, counts: dict[str, int]
) -> Measured:
    plain = measure_classification(zeroshot, labels)
    return Measured(outcomes | {"top1_zeroshot": plain.outcomes["top1"]}, {**plain.counts, **counts})
