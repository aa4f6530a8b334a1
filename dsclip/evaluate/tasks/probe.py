"""Linear probes: logistic regression on frozen image features, with all training samples or a few of each class.

Source: Radford et al. 2021, A.3, with the search of CLIP_benchmark; few shots as Zhou et al. 2022 (CoOp) draw them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.errors import UserError
from dsclip.evaluate.results.result import Measured, Outcomes
from dsclip.evaluate.tasks.logistic import FITS, MOST_FITS, Classifier, search_strength
from dsclip.evaluate.tasks.task import Embedded, Images, Options, TaskKind, lines_sha256
from dsclip.evaluate.tasks.zeroshot import measure_classification, zeroshot_samples

HELD_OUT = 5  # one of so many training samples a class is for the search, where there is no validation set


class LinearProbe:
    """`top1`, `top5` and `mean_per_class_recall` of test samples; with shots `…_4shot`, the mean over draws.

    The strength of the regularisation is the best on the validation set. Without one it is the best on every fifth training sample
    of a class, or, with k shots, on min(k, 4) more samples a class. The last fit is on all training samples and the validation set, with
    shots on the drawn samples alone.
    """

    def __init__(self, dataset: EvalDataset, options: Options):
        self._train, self._validation = labelled_training(options), options.validation
        sets = [self._train, *([self._validation] if self._validation else []), dataset]
        largest = max(label for each in sets for label in each.labels if label is not None)
        self._classes, self._sets = largest + 1, sets
        if options.solver not in FITS:
            raise UserError(f"solver {options.solver!r} is none of {', '.join(FITS)}")
        self._fit, self._shots, self._seeds = FITS[options.solver], options.shots, range(options.seeds)
        self.fitted: Callable[[int, int], None] = lambda done, of: None
        self._fits = 0
        self.images = tuple(Images(each, zeroshot_samples(each, self._classes)) for each in sets)
        self.texts: list[str] = []
        self.protocol = {
            "solver": options.solver, "shots": list(options.shots), "seeds": options.seeds if options.shots else None,
            "classes": self._classes, "validation": self._validation is not None,
            "train_labels_sha256": lines_sha256([str(label) for label in self._train.labels]),
        }  # fmt: skip

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """{"top1", …, "samples", "classes", "regularisation"}, or for each number of shots."""
        self._fits = 0
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        parts = [
            (part.features.to(device), torch.tensor([data.labels[i] for i in part.indices], device=device))
            for part, data in zip(images, self._sets, strict=True)
        ]
        train, validation, test = parts[0], parts[1] if self._validation else None, parts[-1]
        if not self._shots:
            measured, strength = self._full(train, validation, test)
            return replace(measured, counts={**measured.counts, "regularisation": strength}).of_samples(
                images[-1].indices
            )
        outcomes: dict[str, Outcomes] = {}
        counts: dict[str, int | float] = {"samples": len(test[1]), "classes": self._classes}
        for shots in self._shots:
            draws = [self._few(train, validation, test, shots, seed) for seed in self._seeds]
            for name, found in draws[0].outcomes.items():
                values = torch.stack([draw.outcomes[name].values for draw in draws])
                outcomes[f"{name}_{shots}shot"] = replace(found, values=values.mean(dim=0))
            if len(draws) > 1:
                deviation = torch.tensor([draw.outcomes["top1"].value() for draw in draws]).std().item()
                counts[f"top1_{shots}shot_deviation"] = deviation
        return Measured(outcomes, counts).of_samples(images[-1].indices)

    def _full(self, train: Part, validation: Part | None, test: Part) -> tuple[Measured, float]:
        if validation is None:
            place = places_in_class(train[1])
            fitted = (place + 1) % HELD_OUT != 0
            strength = self._search(_rows(train, fitted), _rows(train, ~fitted))
            return self._measured(train, test, strength), strength
        strength = self._search(train, validation)
        both = (torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]]))
        return self._measured(both, test, strength), strength

    def _few(self, train: Part, validation: Part | None, test: Part, shots: int, seed: int) -> Measured:
        order, place = shuffled_places(train[1], self._classes, shots, seed)
        few = _rows(train, order[place < shots])
        if validation is None:
            validation = _rows(train, order[(place >= shots) & (place < shots + min(shots, 4))])
        return self._measured(few, test, self._search(few, validation))

    def _search(self, train: Part, validation: Part) -> float:
        if not len(validation[1]):
            raise UserError(
                "no class has training samples to spare for the search of the regularisation; give a validation set"
            )

        def accuracy(strength: float) -> float:
            logits = self._fitted(train, strength)(validation[0])
            return (logits.argmax(dim=1).cpu() == validation[1].cpu()).double().mean().item()

        return search_strength(accuracy)

    def _measured(self, train: Part, test: Part, strength: float) -> Measured:
        return measure_classification(self._fitted(train, strength)(test[0]).cpu(), test[1].cpu())

    def _fitted(self, train: Part, strength: float) -> Classifier:
        draws = len(self._shots) * len(self._seeds) or 1
        found = self._fit(*train, self._classes, strength)
        self._fits += 1
        self.fitted(self._fits, draws * (MOST_FITS + 1))  # fewer where a search meets the same strength again
        return found


Part = tuple[Tensor, Tensor]  # features [n, d], labels [n]
LINEAR_PROBE = TaskKind("linear_probe", LinearProbe, reads=("train", "validation", "shots", "seeds", "solver"))


def labelled_training(options: Options) -> EvalDataset:
    """The training set. Raises UserError when there is none."""
    if options.train is None:
        raise UserError("this task needs training samples: give --train-data, or a set with a split `train`")
    return options.train


def shuffled_places(labels: Tensor, classes: int, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    """(the samples in an order of `seed`, how many of the same class come before each there), so that places < shots are a draw of shots.

    Raises UserError when a class has fewer samples.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    if int((labels.bincount(minlength=classes) < shots).sum()):
        raise UserError(f"a class has fewer than {shots} training samples; ask for fewer shots")
    return order, places_in_class(labels[order])


def places_in_class(labels: Tensor) -> Tensor:
    """[n]: how many samples of the same class come before each."""
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    places = torch.empty_like(labels)
    places[order] = torch.arange(len(labels), device=labels.device) - starts[labels[order]]
    return places


def _rows(part: Part, rows: Tensor) -> Part:
    return part[0][rows], part[1][rows]
