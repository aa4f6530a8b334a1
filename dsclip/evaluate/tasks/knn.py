"""k nearest neighbours on frozen image features: each of a test sample's k nearest training samples votes for its class.

Source: Wu et al. 2018, section 3.4: votes weigh exp(similarity / 0.07); k = 20 as Caron et al. 2021 (DINO) report.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.errors import UserError
from dsclip.evaluate.results.result import Measured
from dsclip.evaluate.tasks.probe import labelled_training
from dsclip.evaluate.tasks.task import Embedded, Images, Options, TaskKind, lines_sha256
from dsclip.evaluate.tasks.zeroshot import measure_classification, zeroshot_samples

TEMPERATURE = 0.07
ROWS_AT_ONCE = 256  # of the similarities to all training samples


class NearestNeighbours:
    """`top1`, `top5` and `mean_per_class_recall`; among equally near samples those that come first in the set, among equal votes the
    class with the lower number."""

    def __init__(self, dataset: EvalDataset, options: Options):
        train = labelled_training(options)
        largest = max(label for each in (train, dataset) for label in each.labels if label is not None)
        self._classes, self._labels, self._test = largest + 1, train.labels, dataset.labels
        self._neighbours = options.neighbours
        samples = zeroshot_samples(train, self._classes)
        if not 1 <= self._neighbours <= len(samples):
            raise UserError(f"{self._neighbours} neighbours of {len(samples)} training samples")
        self.images = (Images(train, samples), Images(dataset, zeroshot_samples(dataset, self._classes)))
        self.texts: list[str] = []
        self.protocol = {
            "neighbours": self._neighbours, "temperature": TEMPERATURE,
            "train_labels_sha256": lines_sha256([str(label) for label in train.labels]),
        }  # fmt: skip

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """{"top1", "top5" (with five classes or more), "mean_per_class_recall", "samples", "classes"}."""
        (train, of_train), (test, of_test) = images
        labels = torch.tensor([self._labels[i] for i in of_train])
        votes = knn_votes(train, labels, test, min(self._neighbours, len(train)), self._classes)
        found = measure_classification(votes, torch.tensor([self._test[i] for i in of_test]))
        return found.of_samples(of_test)


KNN = TaskKind("knn", NearestNeighbours, reads=("train", "neighbours"))


def knn_votes(train: Tensor, labels: Tensor, test: Tensor, k: int, classes: int) -> Tensor:
    """float64 [m, classes]: the votes that each class gets for test samples [m, d] from their k nearest of train [n, d]."""
    votes = torch.zeros(len(test), classes, dtype=torch.float64)
    for start in range(0, len(test), ROWS_AT_ONCE):
        similarity = test[start : start + ROWS_AT_ONCE] @ train.T
        nearest, place = similarity.topk(k, dim=1)
        # topk takes any of those as near as the last; where there is a choice the first ones in the set count.
        unclear = ((similarity >= nearest[:, -1:]).sum(dim=1) > k).nonzero().flatten()
        if len(unclear):
            ordered = similarity[unclear].sort(dim=1, descending=True, stable=True)
            nearest[unclear], place[unclear] = ordered.values[:, :k], ordered.indices[:, :k]
        weights = (nearest.double() / TEMPERATURE).exp()
        votes[start : start + ROWS_AT_ONCE].scatter_add_(1, labels[place], weights)
    return votes
