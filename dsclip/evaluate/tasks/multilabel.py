"""Zero-shot with several classes an image: mean average precision over classes.

Source: Everingham et al. 2010 (VOC), section 4.2, in the form of CLIP_benchmark: the precision at each relevant image, averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.errors import UserError
from dsclip.evaluate.features import check_finite
from dsclip.evaluate.results.result import Measured, Outcomes
from dsclip.evaluate.tasks.task import Embedded, Images, Options, TaskKind
from dsclip.evaluate.tasks.zeroshot import classifier, prompt_protocol, prompts, zeroshot_prompts


class MultiLabel:
    """`mean_average_precision`: images are ranked for each class by their similarity to its prompts, among equals the first in the set
    first. Classes that no image has don't count. Names and templates as for zero-shot."""

    def __init__(self, dataset: EvalDataset, options: Options):
        self._names, templates = zeroshot_prompts(dataset, options.classnames, options.templates)
        self._labels = dataset.label_sets
        self.images = (Images(dataset, _labelled(dataset, len(self._names))),)
        self.texts = prompts(self._names, templates)
        self.protocol = prompt_protocol(self._names, templates)

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """{"mean_average_precision", "samples", "classes", "classes_without_samples"}."""
        image, decoded = images[0]
        targets = torch.zeros(len(decoded), len(self._names), dtype=torch.bool)
        for row, i in enumerate(decoded):
            targets[row, list(self._labels[i] or ())] = True
        return measure_multilabel(image @ classifier(text, len(self._names)).T, targets).of_samples(decoded)


MULTI_LABEL = TaskKind("multilabel", MultiLabel, reads=("classnames", "templates"))


def _labelled(dataset: EvalDataset, classes: int) -> list[int]:
    """The samples that have a list of labels, also an empty one."""
    indices = [i for i, labels in enumerate(dataset.label_sets) if labels is not None]
    if not indices:
        raise UserError(
            "this task needs several labels a sample: .npy members, or a list under `labels` in their .json"
        )
    largest = max((label for i in indices for label in dataset.label_sets[i] or ()), default=0)
    if largest >= classes:
        raise UserError(f"a sample has class {largest}, but there are {classes} class names")
    return indices


def measure_multilabel(logits: Tensor, targets: Tensor) -> Measured:
    """The result of logits [n, classes] and targets bool [n, classes]. Raises UserError for logits that are not finite, and when all targets are false."""
    check_finite("logits", logits)
    present = targets.any(dim=0)
    if not present.any():
        raise UserError("no image has any of the classes")
    order = logits[:, present].T.argsort(dim=1, descending=True, stable=True)  # [classes, n]
    relevant = targets[:, present].T.gather(1, order)
    groups = torch.arange(len(order)).repeat_interleave(order.shape[1])
    outcomes = Outcomes(relevant.flatten().float(), order.flatten(), "mean_average_precision", groups)
    counts = {"samples": len(logits), "classes": logits.shape[1], "classes_without_samples": int((~present).sum())}
    return Measured({"mean_average_precision": outcomes}, counts)
