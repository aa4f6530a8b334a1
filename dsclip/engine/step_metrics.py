"""What a step reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsclip.engine.host_copy import HostCopy
from dsclip.losses.feature_statistics import FeatureStatistics


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, counted from 1.

    skipped: something was not finite, on whichever rank, and nothing of the step was applied on any; skip_reason: what.
    queue_length: pairs in the queue. numbers: what the device computed; the first property that is looked at waits for it.
    """

    step: int
    lr: float
    skipped: bool
    skip_reason: str | None
    queue_length: int
    numbers: HostCopy

    @property
    def loss(self) -> float:
        """In nats, of the global batch."""
        return self.numbers["loss"].item()

    @property
    def accuracy_image_to_text(self) -> float:
        """Share of the global batch's images whose own caption is the most similar one."""
        return self.numbers["accuracy_image_to_text"].item()

    @property
    def accuracy_text_to_image(self) -> float:
        """Share of the global batch's captions whose own image is the most similar one."""
        return self.numbers["accuracy_text_to_image"].item()

    @property
    def grad_norm(self) -> float:
        """Before clipping; NaN where DeepSpeed has none."""
        return self.numbers["grad_norm"].item()

    @property
    def logit_scale(self) -> float:
        """s itself, after the step."""
        return math.exp(self.numbers["log_scale"].item())

    @property
    def logit_bias(self) -> float | None:
        """Of losses that have one, after the step."""
        return self.numbers["bias"].item() if "bias" in self.numbers else None

    @property
    def masked_negatives(self) -> int:
        """Entries left out of the loss, both directions."""
        return int(self.numbers["masked_negatives"].item())

    @property
    def hard_negatives(self) -> int:
        """Hard-negative captions in the global batch."""
        return int(self.numbers["hard_negatives"].item())

    @property
    def features(self) -> FeatureStatistics | None:
        """Alignment, uniformity and similarities of this rank; None with token-wise features."""
        if "alignment" not in self.numbers:
            return None
        n = self.numbers
        return FeatureStatistics(n["alignment"], n["uniformity"], n["positive"], n["negative"])
