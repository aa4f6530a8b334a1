"""Zero-shot classification: class names in sentences become the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.errors import UserError
from dsclip.evaluate.features import check_finite
from dsclip.evaluate.results.result import Measured, Outcomes, by_group, macro_f1
from dsclip.evaluate.tasks.task import Embedded, Images, Options, TaskKind, Words, lines_sha256
from dsclip.evaluate.tasks.templates import SIMPLE, load_classnames, load_templates

BINS = 15  # of confidence


class Zeroshot:
    """Top-1, top-5 and mean per-class accuracy of the classifier that class names in sentences make.

    Names and templates default to those of the shards' manifest. Samples without a label are left out. Source: Radford et
    al. 2021, section 3.1.4: unit embeddings averaged over templates, made unit again.
    """

    def __init__(self, dataset: EvalDataset, options: Options):
        self._names, self._templates = zeroshot_prompts(dataset, options.classnames, options.templates)
        self._labels, self._groups = dataset.labels, dataset.groups
        self._scale, self._brief = options.logit_scale, options.brief
        self.images = (Images(dataset, zeroshot_samples(dataset, len(self._names))),)
        self.texts = prompts(self._names, self._templates)
        self.protocol = prompt_protocol(self._names, self._templates)

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """{"top1", "top5" (with five classes or more), "mean_per_class_recall", "samples", "classes"}; where there is a logit scale
        "calibration_error"; "macro_f1" unless `Options.brief`; where samples are of groups top1 and top5 of each, their mean and the worst."""
        image, decoded = images[0]
        labels = torch.tensor([self._labels[i] for i in decoded])
        logits = image @ classifier(text, len(self._names)).T
        found = measure_classification(logits, labels)
        outcomes = dict(found.outcomes)
        if self._scale is not None:
            outcomes["calibration_error"] = calibration_error(logits * self._scale, labels)
        if not self._brief:
            outcomes["macro_f1"] = macro_f1(logits.argmax(dim=1), labels)
        groups = [self._groups[i] for i in decoded]
        for name in ("top1", "top5"):
            outcomes |= by_group(name, found.outcomes[name], groups, worst=True) if name in found.outcomes else {}
        return replace(found, outcomes=outcomes).of_samples(decoded)


ZEROSHOT = TaskKind("zeroshot", Zeroshot, reads=("classnames", "templates"))


def zeroshot_prompts(dataset: EvalDataset, classnames: Words, templates: Words) -> tuple[list[str], list[str]]:
    """(class names, sentences with {}), given or of the shards' manifest. Raises UserError when there are none."""
    names = load_classnames(classnames) or dataset.classes
    if not names:
        raise UserError(
            "zero-shot classification needs class names, and these shards' manifest has none: give eval.classnames "
            "(--classnames), one name a line"
        )
    return names, load_templates(templates) or load_templates(dataset.templates) or SIMPLE


def zeroshot_samples(dataset: EvalDataset, classes: int) -> list[int]:
    """The samples that have a label. Raises UserError when none has, or one is of a class without a name."""
    indices = [i for i, label in enumerate(dataset.labels) if label is not None]
    if not indices:
        raise UserError("zero-shot classification needs labels: none of these samples has a .cls member")
    largest = max(label for label in dataset.labels if label is not None)
    if largest >= classes:
        raise UserError(f"a sample has class {largest}, but there are {classes} class names")
    return indices


def prompts(names: list[str], templates: list[str]) -> list[str]:
    """Each name in each sentence, name by name."""
    # Not str.format: a class name or template is data, and braces in it are text.
    return [template.replace("{}", name) for name in names for template in templates]


def prompt_protocol(names: list[str], templates: list[str]) -> dict[str, int | str]:
    """What the record says of prompts."""
    return {
        "classes": len(names), "classnames_sha256": lines_sha256(names), "templates": len(templates),
        "templates_sha256": lines_sha256(templates),
    }  # fmt: skip


def classifier(text: Tensor, classes: int) -> Tensor:
    """Unit class embeddings [classes, d] of the unit features of `prompts`: the mean over templates."""
    return F.normalize(text.view(classes, len(text) // classes, -1).mean(dim=1), dim=-1)


def measure_classification(logits: Tensor, labels: Tensor) -> Measured:
    """The result of logits [n, classes] and labels [n]; among equal logits the class with the lower number comes first.

    Raises UserError for logits that are not finite.
    """
    check_finite("logits", logits)
    classes, rows = logits.shape[1], torch.arange(len(labels))
    own = logits.gather(1, labels[:, None])
    first = torch.arange(classes) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & first)).sum(dim=1)
    top1 = (rank == 0).float()
    outcomes = {"top1": Outcomes(top1, rows)}
    if classes >= 5:
        outcomes["top5"] = Outcomes((rank < 5).float(), rows)
    outcomes["mean_per_class_recall"] = Outcomes(top1, rows, "mean_of_groups", labels)
    return Measured(outcomes, {"samples": len(labels), "classes": classes})


def calibration_error(logits: Tensor, labels: Tensor) -> Outcomes:
    """Expected calibration error of logits [n, classes]: how far confidence and share of hits lie apart, on average over 15 bins of
    confidence of equal width, the upper end included. Source: Guo et al. 2017, equation 3."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    return Outcomes((predicted == labels).double() - confidence, torch.arange(len(labels)), "gap_of_groups", bins)
