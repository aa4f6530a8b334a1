"""What a step reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsclip.distributed import Collectives
from dsclip.engine.expert_balance import EXPERT
from dsclip.engine.host_copy import HostCopy
from dsclip.engine.loss_scalars import LossScalars
from dsclip.losses.feature_statistics import FeatureStatistics
from dsclip.objectives import ObjectiveGrads

TERM = "term_"  # before the names of the objective's values among the numbers

OF_THE_OPTIMIZER = ("update_rms", "clipped_tensors")


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, counted from 1.

    skipped: something was not finite, on whichever rank, and nothing of the step was applied on any; skip_reason: what.
    queue_length: pairs in the queue. numbers: what the device computed; the first property that is looked at waits for it.
    pulse: loss and gradient norm of this very step, also where the other numbers are an earlier one's.
    """

    step: int
    lr: float
    skipped: bool
    skip_reason: str | None
    queue_length: int
    numbers: HostCopy
    pulse: HostCopy | None = None

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
    def optimizer(self) -> dict[str, float]:
        """What the optimizer says of its step; of StableAdamW the largest RMS of a tensor, and how many were clipped."""
        return {name: self.numbers[name].item() for name in OF_THE_OPTIMIZER if name in self.numbers}

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

    @property
    def experts(self) -> dict[str, float]:
        """Of each routed block that is trained, by name, the share of the global batch's tokens that its busiest expert had."""
        names = [name for name in self.numbers if name.startswith(EXPERT)]
        return {name.removeprefix(EXPERT): self.numbers[name].item() for name in names}

    @property
    def terms(self) -> dict[str, float]:
        """What the objective sums, each by its title and without its weight; `pair` is the loss section's. Empty: that alone."""
        names = [name for name in self.numbers if name.startswith(TERM)]
        return {name.removeprefix(TERM): self.numbers[name].item() for name in names}


def step_numbers(
    grads: ObjectiveGrads, scalars: LossScalars, hard_negatives: int, norm: float | Tensor | None, total: int,
    group: Collectives,
) -> dict[str, Tensor]:  # fmt: skip
    """The numbers of a step, on the device. Collective. hard_negatives: this rank's; total: pairs of the global batch."""
    device = scalars.log_scale.device
    # Filled on the device: for a copy of a number the host would wait.
    hard = torch.full((), hard_negatives, device=device)
    counts = torch.stack([grads.correct_image, grads.correct_text, grads.masked.to(device), hard])
    correct_image, correct_text, masked, hard = group.all_reduce_sum(counts)
    numbers = {
        **pulse_numbers(grads.loss, norm),
        "accuracy_image_to_text": correct_image / total,
        "accuracy_text_to_image": correct_text / total,
        "masked_negatives": masked,
        "hard_negatives": hard,
        "log_scale": scalars.log_scale,
    }
    if scalars.bias is not None:
        numbers["bias"] = scalars.bias
    return numbers | {TERM + name: value for name, value in grads.values.items()}


def pulse_numbers(loss: Tensor, norm: float | Tensor | None) -> dict[str, Tensor]:
    """Loss and gradient norm, the same on all ranks, on the loss's device. norm: as DeepSpeed has it, on any device."""
    if not isinstance(norm, Tensor) or norm.device != loss.device:
        norm = torch.full((), math.nan if norm is None else float(norm), dtype=torch.float64, device=loss.device)
    return {"loss": loss, "grad_norm": norm}
