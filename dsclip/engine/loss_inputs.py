"""From the features of all micro-batches to what the objective sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsclip.config.schema import LossSection
from dsclip.data.batch import OF_TEACHER, Batch
from dsclip.engine.feature_queue import FeatureQueue
from dsclip.engine.loss_scalars import LossScalars
from dsclip.engine.micro_batch import MicroBatch, MicroBatcher, needed
from dsclip.errors import UserError
from dsclip.losses import Pairs


@dataclass(frozen=True)
class LossInputs:
    """Joins features, hard negatives and queue. context: tokens of a caption, for token-wise features."""

    settings: LossSection
    micro_batcher: MicroBatcher
    context: int
    token_wise: bool

    def __call__(
        self,
        micro_batches: list[MicroBatch],
        features: list[tuple[Tensor, Tensor]],
        batch: Batch,
        scalars: LossScalars,
        queue: FeatureQueue | None,
        step: int,
    ) -> tuple[Pairs, dict[str, Tensor]]:
        """(the pairs of this rank, features of further views and heads by name). features: of each micro-batch, detached."""
        parts = [m.split(each) for m, each in zip(micro_batches, features, strict=True)]
        names = [name for name in parts[0] if name != "hard_text" or self.settings.hard_negatives != "none"]
        found = {name: torch.cat([part[name] for part in parts]) for name in names}
        extra: dict[str, Tensor] = {}
        if self.settings.duplicates != "negative" or self.micro_batcher.recipe.objective.needs_keys:
            extra["keys"] = self.micro_batcher.to_device(needed(batch.keys, "keys", step))
        if classes := self.micro_batcher.recipe.objective.classes:
            extra["classes"] = self.micro_batcher.to_device(
                _checked(needed(batch.classes, "classes", step), classes, step)
            )
        if "hard_text" in found:
            extra["hard_owner"] = torch.cat([m.hard_owner for m in micro_batches])
        if self.token_wise:
            valid = [m.split_texts(m.captions.valid(self.context)) for m in micro_batches]
            extra["text_valid"] = torch.cat([v["text"] for v in valid])
            if "hard_text" in found:
                extra["hard_valid"] = torch.cat([v["hard_text"] for v in valid])
        if queue is not None:
            extra |= queue.negatives(step)
        if self.settings.wire_dtype == "bf16":
            found = micro_batches[0].columns.narrowed(found)
        if "hard_text" in found:
            extra["hard_text"] = found.pop("hard_text")
        bias = None if scalars.bias is None else scalars.bias.detach()
        return Pairs(found.pop("image"), found.pop("text"), scalars.log_scale.detach(), bias, **extra), found

    def teacher(self, batch: Batch, step: int) -> dict[str, Tensor] | None:
        """The teacher's features of this rank's samples by name; None where nothing distils. Raises UserError."""
        if not self.micro_batcher.recipe.objective.distils:
            return None
        found = {}
        for name in ("image", "text"):
            features = batch.views.get(OF_TEACHER + name)
            if (
                features is None
                or features.ndim != 2
                or len(features) != len(batch)
                or not features.is_floating_point()
            ):
                what = "missing" if features is None else f"{features.dtype} {tuple(features.shape)}"
                raise UserError(
                    f"step {step}: a term that distils needs batch.views[{OF_TEACHER + name!r}], {len(batch)} rows of features; it is {what}"
                )
            found[name] = self.micro_batcher.to_device(features)
        return found


def _checked(found: Tensor, classes: int, step: int) -> Tensor:
    """Raises UserError for a class that the classifier doesn't have; found is in host memory, where looking waits for nothing."""
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < classes:
        raise UserError(
            f"step {step}: batch.classes has {int(found.min())} to {int(found.max())}; the classifier's are 0 to {classes - 1}"
        )
    return found
