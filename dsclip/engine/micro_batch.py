"""The micro-batches: parts of the local batch that go through the towers one after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsclip.config.schema import Recipe
from dsclip.data.batch import Batch
from dsclip.errors import UserError
from dsclip.losses import LossGrads
from dsclip.model import Captions, Clip, ClipConfig
from dsclip.model.captions import cut_captions
from dsclip.model.patch_dropout import visible_patches


@dataclass(frozen=True)
class MicroBatch:
    """What one forward needs. The same object goes through the towers twice, with the same visible patches.

    images [b, 3, S, S]; captions [b + m]: those of the images, then their hard negatives; hard_owner [m]: the row of
    the local batch that each hard negative belongs to; visible_patches: of each image, None without patch dropout.
    image_features [b, D], text_features [b + m, D]: where they are known already, and that tower has nothing to do.
    """

    images: Tensor
    captions: Captions
    hard_owner: Tensor
    visible_patches: Tensor | None
    image_features: Tensor | None = None
    text_features: Tensor | None = None

    def knowing(self, features: tuple[Tensor, Tensor], model: Clip) -> MicroBatch:
        """The same with those of a locked tower, as they were computed: without a graph they are needed once."""
        image, text = features
        return replace(
            self,
            image_features=image if model.visual.all_locked else self.image_features,
            text_features=text if model.text.all_locked else self.text_features,
        )

    def completed(self, image: Tensor | None, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a forward gave, with the known features in the place of those that it was spared."""
        image = self.image_features if image is None else image
        text = self.text_features if text is None else text
        if image is None or text is None:
            raise RuntimeError("a micro-batch's forward left out features that are not known")
        return image, text


@dataclass(frozen=True)
class MicroBatcher:
    """Splits the local batch into micro-batches of the recipe's size, on the device."""

    recipe: Recipe
    config: ClipConfig
    device: torch.device
    rank: int
    world_size: int

    def split(self, batch: Batch, step: int) -> list[MicroBatch]:
        """The micro-batches, in the order of the samples. Raises UserError when the batch isn't what the recipe says."""
        n = len(batch)
        expected = self.recipe.batch.global_batch_size // self.world_size
        if n != expected or len(batch.tokens) != n:
            raise UserError(
                f"step {step}: rank {self.rank} was given {n} images and {len(batch.tokens)} captions; "
                f"batch.global_batch_size over {self.world_size} ranks is {expected} pairs a rank"
            )
        size = self.recipe.batch.micro_batch_size or n
        return [self._micro_batch(batch.rows(start, min(n, start + size)), step, start) for start in range(0, n, size)]

    def _micro_batch(self, rows: Batch, step: int, start: int) -> MicroBatch:
        tokens, hard_owner = rows.tokens, torch.zeros(0, dtype=torch.int64)
        if self.recipe.loss.hard_negatives != "none":
            hard_owner = needed(rows.hard_owner, "hard_owner", step) + start
            tokens = torch.cat([tokens, needed(rows.hard_tokens, "hard_tokens", step)])
        chunk_size, samples = self.recipe.batch.chunk_size, len(rows.images)
        captions = cut_captions(tokens, self.config, chunk_size, self.device, samples=samples)
        images, hard_owner = self.to_device(rows.images), self.to_device(hard_owner)
        return MicroBatch(images, captions, hard_owner, self._visible_patches(rows.sample_ids, step))

    def to_device(self, x: Tensor) -> Tensor:
        """x on the device, without waiting for the copy."""
        if self.device.type == "cuda" and x.device.type == "cpu":
            x = x.pin_memory()
        return x.to(self.device, non_blocking=True)

    def _visible_patches(self, sample_ids: Tensor, step: int) -> Tensor | None:
        if not self.config.patch_dropout:
            return None
        seed, share = self.recipe.train.seed, self.config.patch_dropout
        return visible_patches(self.to_device(sample_ids), self.config.patches, share, seed=seed, step=step)


def needed(value: Tensor | None, name: str, step: int) -> Tensor:
    """A field of the batch which the recipe's loss can't do without. Raises UserError."""
    if value is None:
        raise UserError(f"step {step}: the loss section of the recipe needs batch.{name}, which is missing")
    return value


def split_gradients(micro_batches: list[MicroBatch], grads: LossGrads) -> list[tuple[Tensor, Tensor]]:
    """The gradients of each micro-batch's features, in the order of its tokens."""
    sizes = [len(m.images) for m in micro_batches]
    texts = grads.d_text.split(sizes)
    if grads.d_hard_text is not None:
        hard = grads.d_hard_text.split([len(m.hard_owner) for m in micro_batches])
        texts = [torch.cat(parts) for parts in zip(texts, hard, strict=True)]
    return list(zip(grads.d_image.split(sizes), texts, strict=True))
