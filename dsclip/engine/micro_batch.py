"""A rank's share of the global batch, cut into the parts that go through the towers one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsclip.config.schema import Recipe
from dsclip.data.batch import Batch
from dsclip.errors import UserError
from dsclip.losses import LossGrads
from dsclip.model import ClipConfig
from dsclip.model.patch_dropout import visible_patches


@dataclass(frozen=True)
class MicroBatch:
    """What one forward needs. The same object goes through the towers twice, with the same visible patches.

    tokens: the captions of the images, then their hard negatives, whose images are the rows hard_owner of the batch.
    """

    images: Tensor
    tokens: Tensor
    hard_owner: Tensor
    visible_patches: Tensor | None


@dataclass(frozen=True)
class Cutter:
    """Cuts batches by the recipe, and puts the parts on the device."""

    recipe: Recipe
    config: ClipConfig
    device: torch.device
    rank: int
    world_size: int

    def cut(self, batch: Batch, step: int) -> list[MicroBatch]:
        """The micro-batches. Raises UserError when the batch isn't what the recipe says."""
        n = len(batch)
        expected = self.recipe.batch.global_batch_size // self.world_size
        if n != expected or len(batch.tokens) != n:
            raise UserError(
                f"step {step}: rank {self.rank} was given {n} images and {len(batch.tokens)} captions; "
                f"batch.global_batch_size over {self.world_size} ranks is {expected} pairs a rank"
            )
        size = self.recipe.batch.micro_batch_size or n
        return [self._part(batch.rows(start, min(n, start + size)), step, start) for start in range(0, n, size)]

    def _part(self, rows: Batch, step: int, start: int) -> MicroBatch:
        images, tokens = self.put(rows.images), self.put(rows.tokens)
        hard_owner = torch.zeros(0, dtype=torch.int64, device=self.device)
        if self.recipe.loss.hard_negatives != "none":
            hard_owner = self.put(needed(rows.hard_owner, "hard_owner", step) + start)
            tokens = torch.cat([tokens, self.put(needed(rows.hard_tokens, "hard_tokens", step))])
        return MicroBatch(images, tokens, hard_owner, self._visible_patches(rows.sample_ids, step))

    def put(self, x: Tensor) -> Tensor:
        """x on the device."""
        return x.to(self.device, non_blocking=True)

    def _visible_patches(self, sample_ids: Tensor, step: int) -> Tensor | None:
        if not self.config.patch_dropout:
            return None
        seed, share = self.recipe.train.seed, self.config.patch_dropout
        return visible_patches(self.put(sample_ids), self.config.patches, share, seed=seed, step=step)


def needed(value: Tensor | None, name: str, step: int) -> Tensor:
    """A field of the batch which the recipe's loss can't do without. Raises UserError."""
    if value is None:
        raise UserError(f"step {step}: the loss section of the recipe needs batch.{name}, which is missing")
    return value


def split_gradients(micro: list[MicroBatch], grads: LossGrads) -> list[tuple[Tensor, Tensor]]:
    """The gradients of each micro-batch's features, in the order of its tokens."""
    sizes = [len(m.images) for m in micro]
    texts = grads.d_text.split(sizes)
    if grads.d_hard_text is not None:
        hard = grads.d_hard_text.split([len(m.hard_owner) for m in micro])
        texts = [torch.cat(parts) for parts in zip(texts, hard, strict=True)]
    return list(zip(grads.d_image.split(sizes), texts, strict=True))
