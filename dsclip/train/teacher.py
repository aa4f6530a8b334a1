"""The teacher that a run distils from: a model beside the student, or features that were stored in the shards beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsclip.config import Recipe
from dsclip.config.data_section import DataSection
from dsclip.config.objective_section import STORED
from dsclip.convert.source import open_source
from dsclip.convert.streamed import loaded_clip
from dsclip.convert.whole import check_tokenizer, tokenizer_of
from dsclip.data.batch import OF_TEACHER, Batch
from dsclip.data.decoding.tokenizer import Tokenizer
from dsclip.data.shards.manifest import read_manifest
from dsclip.data.shards.specification import resolve_shards
from dsclip.data.sources.storage import Storage
from dsclip.errors import UserError
from dsclip.model import Clip

DRAWN_BY = (
    "caption_key", "crop_scale", "flip", "color_jitter", "color_jitter_probability", "grayscale", "decoder", "templates", "classnames",
)  # fmt: skip
"""Keys of the data section that decide what crop and caption of a sample a pass shows."""


@dataclass(frozen=True)
class Teacher:
    """A model for inference that every rank holds whole, outside DeepSpeed: it has no gradient and nothing of it is saved.

    Images of another size than its own are resized; captions are tokenized as it wants them.
    """

    model: Clip
    tokenizer: Tokenizer
    device: torch.device
    chunk_size: int | None
    scale: float

    @torch.no_grad()
    def features(self, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Unit features [n, D], [n, D] in float32 of uint8 images [n, 3, S, S], augmented as the student sees them, and of their captions."""
        config = self.model.config
        images = images.to(self.device)
        if images.shape[-1] != config.image_size:
            side = (config.image_size, config.image_size)
            images = (
                F.interpolate(images.float(), side, mode="bicubic", antialias=True)
                .round()
                .clamp(0, 255)
                .to(torch.uint8)
            )
        tokens = self.tokenizer(captions, config.context_length)
        image, text = self.model(images, tokens, chunk_size=self.chunk_size)
        return image.float(), text.float()

    def teach(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches with the teacher's features of their samples among the views."""
        for batch in batches:
            image, text = self.features(batch.images, batch.report.captions)
            yield replace(batch, views=batch.views | {f"{OF_TEACHER}image": image, f"{OF_TEACHER}text": text})


def open_teacher(path: str, device: torch.device, chunk_size: int | None) -> Teacher:
    """The model in a folder or of a name as `model.init` takes it, in bf16 on a GPU and in float32 on a CPU. Raises UserError."""
    try:
        source = open_source(path)
        tokenizer = tokenizer_of(source, None)
        config = source.config(tokenizer.eot_token_id)
        check_tokenizer(tokenizer, config, source)
    except UserError as error:
        raise UserError(f"`objective.teacher`: {error}") from error
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return Teacher(loaded_clip(config, source.weights(), device, dtype), tokenizer, device, chunk_size, source.scale)


def teacher_of(recipe: Recipe, device: torch.device) -> Teacher | None:
    """The teacher that runs beside the student; None without one, and for one whose features are stored."""
    path = recipe.objective.teacher
    if path in (None, STORED):
        return None
    return open_teacher(str(path), device, recipe.batch.chunk_size or recipe.batch.micro_batch_size)


def with_teacher(recipe: Recipe, image_size: int, storage: Storage) -> Recipe:
    """The recipe with the teacher's temperature, its own where none is given. Raises UserError when there is no such teacher."""
    objective = recipe.objective
    if objective.teacher is None:
        return recipe
    scale = (
        stored_by(recipe, image_size, storage)["scale"] if objective.teacher == STORED else _scale(objective.teacher)
    )
    temperature = objective.teacher_temperature or 1 / scale
    return replace(recipe, objective=replace(objective, teacher_temperature=temperature))


def _scale(path: str) -> float:
    try:
        return open_source(path).scale
    except UserError as error:
        raise UserError(f"`objective.teacher`: {error}") from error


def stored_by(recipe: Recipe, image_size: int, storage: Storage) -> dict[str, Any]:
    """What the manifests of the training shards say of the teacher whose features are stored in them.

    Raises UserError where they say nothing, or were written for other crops and captions than this run's.
    """
    if recipe.data.weights is not None:
        raise UserError(
            "`objective.teacher` is `stored`, which needs one set of training shards; leave out `data.weights`"
        )
    manifest = read_manifest(resolve_shards(recipe.data.train_shards, storage), storage)
    found = manifest.get("teacher") if manifest else None
    if found is None:
        raise UserError(
            "`objective.teacher` is `stored`, and the manifest of the training shards says no teacher; write its features with "
            "tools/reinforce_shards.py"
        )
    now = drawn_by(recipe.data, recipe.train.seed, image_size)
    if different := next((key for key, value in now.items() if found["drawn_by"].get(key) != value), None):
        raise UserError(
            f"the teacher's features are of crops and captions with {different}={found['drawn_by'].get(different)}, and this run has "
            f"{now[different]}; take the same, or write them anew with tools/reinforce_shards.py"
        )
    return found


def taught_passes(recipe: Recipe, image_size: int) -> int | None:
    """So many passes over the training shards have stored features of a teacher; None where the run uses none."""
    if recipe.objective.teacher != STORED:
        return None
    storage = Storage(tuple(recipe.data.trusted_hosts), recipe.data.retries)
    return int(stored_by(recipe, image_size, storage)["passes"])


def drawn_by(data: DataSection, seed: int, image_size: int) -> dict[str, Any]:
    """All that decides what crop and caption of a sample a pass shows, as JSON."""
    return {"train.seed": seed, "image_size": image_size} | {f"data.{key}": getattr(data, key) for key in DRAWN_BY}
