"""Zero-shot classification: class names in sentences become the classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.errors import UserError
from dsclip.evaluate.features import Embedder, check_finite
from dsclip.evaluate.templates import SIMPLE, load_classnames, load_templates


def zeroshot(
    embedder: Embedder,
    dataset: EvalDataset,
    *,
    classnames: str | list[str] | None = None,
    templates: str | list[str] | None = None,
) -> dict[str, float]:
    """{"top1", "top5" (with five classes or more), "mean_per_class_recall", "samples", "classes"}; shares in 0..1.

    classnames and templates default to those of the shards' manifest. Samples without a label are left out.
    Source: Radford et al. 2021, section 3.1.4: unit embeddings averaged over templates, made unit again. Collective.
    """
    names, sentences = zeroshot_prompts(dataset, classnames, templates)
    classifier = build_classifier(embedder, names, sentences)
    image, indices = embedder.images(dataset, zeroshot_samples(dataset, len(names)))
    return classification_metrics(image @ classifier.T, torch.tensor([dataset.labels[i] for i in indices]))


def zeroshot_prompts(
    dataset: EvalDataset, classnames: str | list[str] | None, templates: str | list[str] | None
) -> tuple[list[str], list[str]]:
    """(class names, sentences with {}), given or of the shards' manifest. Raises UserError when there are none."""
    names = load_classnames(classnames) or dataset.classes
    if not names:
        raise UserError(
            "zero-shot classification needs class names, and these shards' manifest has none: give eval.classnames "
            "(--classnames), one name a line"
        )
    return names, load_templates(templates) or dataset.templates or SIMPLE


def zeroshot_samples(dataset: EvalDataset, classes: int) -> list[int]:
    """The samples that have a label. Raises UserError when none has, or one is of a class without a name."""
    indices = [i for i, label in enumerate(dataset.labels) if label is not None]
    if not indices:
        raise UserError("zero-shot classification needs labels: none of these samples has a .cls member")
    largest = max(label for label in dataset.labels if label is not None)
    if largest >= classes:
        raise UserError(f"a sample has class {largest}, but there are {classes} class names")
    return indices


def build_classifier(embedder: Embedder, names: list[str], templates: list[str]) -> Tensor:
    """Unit class embeddings [classes, d]: the mean over templates."""
    # Not str.format: a class name or template is data, and braces in it are text.
    prompts = [template.replace("{}", name) for name in names for template in templates]
    text = embedder.texts(prompts)
    return F.normalize(text.view(len(names), len(templates), -1).mean(dim=1), dim=-1)


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics of logits [n, classes] and labels [n]. Raises UserError for logits that are not finite."""
    check_finite("logits", logits)
    classes = logits.shape[1]
    ranked = logits.topk(min(5, classes), dim=1).indices
    hits = ranked == labels[:, None]
    recalls = [hits[labels == c, 0].double().mean() for c in labels.unique()]
    metrics = {"top1": hits[:, 0].double().mean().item()}
    if classes >= 5:
        metrics["top5"] = hits.any(dim=1).double().mean().item()
    metrics["mean_per_class_recall"] = torch.stack(recalls).mean().item()
    return metrics | {"samples": len(labels), "classes": classes}
