"""What a step reports."""

from __future__ import annotations

from dataclasses import dataclass

from dsclip.losses.feature_statistics import FeatureStatistics


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, counted from 1. loss in nats; accuracies over the global batch; norm before clipping.

    masked_negatives: entries left out of the loss, both directions; hard_negatives: hard-negative captions in the
    global batch; queue_length: pairs in the queue. features: alignment, uniformity and similarities of this rank.
    skipped: something was not finite, on whichever rank, and nothing of the step was applied on any; skip_reason: what.
    """

    step: int
    loss: float
    accuracy_image_to_text: float
    accuracy_text_to_image: float
    logit_scale: float
    lr: float
    grad_norm: float
    skipped: bool
    skip_reason: str | None
    logit_bias: float | None
    masked_negatives: int
    hard_negatives: int
    queue_length: int
    features: FeatureStatistics | None
