"""The micro-batches: parts of the local batch that go through the towers one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from dsclip.config.objective_section import ObjectiveSection
from dsclip.config.schema import Recipe
from dsclip.data.batch import Batch
from dsclip.engine.head_columns import HeadColumns
from dsclip.errors import UserError
from dsclip.losses import LossGrads
from dsclip.model import Captions, Clip, ClipConfig
from dsclip.model.captions import cut_captions
from dsclip.model.patch_dropout import view_ids, visible_patches


@dataclass(frozen=True)
class MicroBatch:
    """What one forward needs of b samples. The same object goes through the towers twice, with the same visible patches.

    images [v·b, 3, S, S]: those of the samples, then of each further view; captions [b + m + w·b]: those of the samples,
    their hard negatives, then those of each further view; hard_owner [m]: the row of the local batch that each hard
    negative belongs to; visible_patches: of each image, None without patch dropout; views: the further ones, in order.
    ids [v·b], tokens [b + m + w·b, L]: what images and captions are known by, in host memory.
    columns: where named heads' features lie in what a tower gives.
    image_features [v·b, D], text_features [b + m + w·b, D]: where they are known already, and that tower has nothing to do.
    """

    images: Tensor
    captions: Captions
    hard_owner: Tensor
    visible_patches: Tensor | None
    samples: int
    ids: Tensor
    tokens: Tensor
    views: tuple[str, ...] = ()
    columns: HeadColumns = field(default_factory=HeadColumns)
    image_features: Tensor | None = None
    text_features: Tensor | None = None

    def split_images(self, rows: Tensor) -> dict[str, Tensor]:
        """What the image tower made of `images`, by view, [b, ...] each."""
        names = ("image", *(v for v in self.views if v.startswith("image")))
        return dict(zip(names, rows.split(self.samples), strict=True))

    def split_texts(self, rows: Tensor) -> dict[str, Tensor]:
        """The same of `captions`; hard negatives [m, ...] are `hard_text`."""
        views = [v for v in self.views if v.startswith("text")]
        sizes = [self.samples, len(self.hard_owner), *[self.samples] * len(views)]
        return dict(zip(("text", "hard_text", *views), rows.split(sizes), strict=True))

    def split(self, features: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The features of both towers by name, and of their named heads."""
        return self.columns.split(self.split_images(features[0]) | self.split_texts(features[1]))

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
        for view in self.recipe.objective.further_views:
            self._check_view(view, batch, step)
        size = self.recipe.batch.micro_batch_size or n
        return [self._micro_batch(batch.rows(start, min(n, start + size)), step, start) for start in range(0, n, size)]

    def of_pairs_alone(self) -> MicroBatcher:
        """The same without hard negatives and further views, which no queue holds."""
        loss = replace(self.recipe.loss, hard_negatives="none")
        return replace(self, recipe=replace(self.recipe, loss=loss, objective=ObjectiveSection()))

    def _check_view(self, name: str, batch: Batch, step: int) -> None:
        """A view must look like what it is another view of."""
        first = batch.images if name.startswith("image") else batch.tokens
        view = batch.views.get(name)
        if view is None:
            raise UserError(f"step {step}: a term of the objective needs batch.views[{name!r}], which is missing")
        if view.dtype != first.dtype or view.shape != first.shape:
            raise UserError(
                f"step {step}: the view {name} is {view.dtype} {tuple(view.shape)}; it must be {first.dtype} "
                f"{tuple(first.shape)}, as the batch's own"
            )

    def _micro_batch(self, rows: Batch, step: int, start: int) -> MicroBatch:
        views, hard_owner = self.recipe.objective.further_views, torch.zeros(0, dtype=torch.int64)
        image_views, text_views = ([v for v in views if v.startswith(kind)] for kind in ("image", "text"))
        tokens = [rows.tokens]
        if self.recipe.loss.hard_negatives != "none":
            hard_owner = needed(rows.hard_owner, "hard_owner", step) + start
            tokens.append(needed(rows.hard_tokens, "hard_tokens", step))
        tokens += [rows.views[view] for view in text_views]
        texts = joined(tokens)
        captions = cut_captions(
            texts, self.config, self.recipe.batch.chunk_size, self.device,
            samples=len(rows) * (1 + len(text_views)),
        )  # fmt: skip
        images = joined([self.to_device(x) for x in (rows.images, *(rows.views[view] for view in image_views))])
        ids = joined([rows.sample_ids, *(view_ids(rows.sample_ids, int(view[-1])) for view in image_views)])
        visible = self._visible_patches(ids, step)
        hard_owner = self.to_device(hard_owner)
        return MicroBatch(
            images, captions, hard_owner, visible, len(rows), ids.cpu(), texts.cpu(), views, self._columns
        )

    @cached_property
    def _columns(self) -> HeadColumns:
        return HeadColumns.of(self.recipe.objective, self.config.embed_dim)

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
    """A field of the batch which the recipe's loss or objective can't do without. Raises UserError."""
    if value is None:
        raise UserError(
            f"step {step}: the {'objective' if name == 'classes' else 'loss section'} of the recipe needs batch.{name}, which is missing"
        )
    return value


def joined(parts: list[Tensor]) -> Tensor:
    """Rows one after the other, without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def split_gradients(
    micro_batches: list[MicroBatch], grads: LossGrads, further: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The gradients of each micro-batch's features, in the order of its images and tokens. further: of further views and heads."""
    first, sizes = micro_batches[0], [m.samples for m in micro_batches]
    found = {"image": grads.d_image, "text": grads.d_text, **further}
    if grads.d_hard_text is not None:
        found["hard_text"] = grads.d_hard_text
    whole = first.columns.joined(found)
    images, texts = [whole["image"].split(sizes)], [whole["text"].split(sizes)]
    if grads.d_hard_text is not None:
        texts.append(whole["hard_text"].split([len(m.hard_owner) for m in micro_batches]))
    for view in first.views:
        (images if view.startswith("image") else texts).append(whole[view].split(sizes))
    image_parts, text_parts = ([joined(list(parts)) for parts in zip(*x, strict=True)] for x in (images, texts))
    return list(zip(image_parts, text_parts, strict=True))
