"""Cross-entropy of a classifier against the class of each sample."""

from __future__ import annotations

from dataclasses import dataclass

from dsclip.config.objective_section import TermSection
from dsclip.errors import UserError
from dsclip.losses import Group, Negatives
from dsclip.objectives.term import Features, TermGrads


@dataclass(frozen=True)
class CrossEntropy:
    """−mean Σ_c y_c·log p_c over the global batch, p = softmax(logits), y = (1 − ε)·[c is the class] + ε/C.

    label_smoothing ε: Szegedy et al. 2016, "Rethinking the Inception Architecture", §7.
    """

    logits: str
    label_smoothing: float

    def __call__(self, features: Features, *, group: Group) -> TermGrads:
        logits, classes = features[self.logits], features.classes
        if classes is None:
            raise UserError("the term cross_entropy needs the class of each sample, and the batch has none")
        log_p = logits.log_softmax(dim=1)
        target = logits.new_full(logits.shape, self.label_smoothing / logits.shape[1])
        own = target.new_full((len(classes), 1), 1 - self.label_smoothing)
        target.scatter_add_(1, classes[:, None], own)
        total = group.world_size * len(logits)
        value = group.all_reduce_sum(-(target * log_p).sum()) / total
        return TermGrads(value, {self.logits: (log_p.exp() - target) / total})


def cross_entropy(settings: TermSection, negatives: Negatives) -> CrossEntropy:
    """The term of these settings."""
    if len(settings.between) != 1:
        raise UserError(
            f"objective.terms: `cross_entropy` is of {', '.join(settings.between)}; give one feature of a classifier, such as [image.classes]"
        )
    return CrossEntropy(settings.between[0], settings.label_smoothing or 0.0)
