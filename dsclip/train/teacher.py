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
from dsclip.convert.source import Source, open_source
from dsclip.convert.streamed import loaded_clip
from dsclip.convert.whole import check_tokenizer, tokenizer_of
from dsclip.data.batch import OF_TEACHER, Batch
from dsclip.data.decoding.tokenizer import Tokenizer
from dsclip.data.shards.manifest import folder_of, manifests_beside
from dsclip.data.shards.shard_set import named_shards
from dsclip.data.sources.storage import Storage
from dsclip.errors import UserError
from dsclip.model import Clip, ClipConfig
from dsclip.objectives.distill import check_widths

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


@dataclass(frozen=True)
class OpenTeacher:
    """A teacher whose weights are still on the disk."""

    source: Source
    tokenizer: Tokenizer
    config: ClipConfig

    def load(self, device: torch.device, chunk_size: int | None) -> Teacher:
        """In bf16 on a GPU and in float32 on a CPU."""
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = loaded_clip(self.config, self.source.weights(), device, dtype)
        return Teacher(model, self.tokenizer, device, chunk_size, self.source.scale)


def open_teacher(path: str, given_as: str = "`objective.teacher`") -> OpenTeacher:
    """The model in a folder or of a name as `model.init` takes it. given_as: what messages call it. Raises UserError."""
    try:
        if not path:
            raise UserError("it is empty; name a model")
        source = open_source(path)
        tokenizer = tokenizer_of(source, None)
        config = source.config(tokenizer.eot_token_id)
        check_tokenizer(tokenizer, config, source)
    except UserError as error:
        raise UserError(f"{given_as}: {error}") from error
    return OpenTeacher(source, tokenizer, config)


@dataclass(frozen=True)
class Taught:
    """What is known of a run's teacher before the run begins.

    scale: its logit scale; beside: the model, None where its features are stored; passes: over the data that these are of, None
    beside a model.
    """

    scale: float
    beside: OpenTeacher | None = None
    passes: int | None = None

    def temperate(self, recipe: Recipe) -> Recipe:
        """The recipe with the teacher's temperature, its own where none is given."""
        temperature = recipe.objective.teacher_temperature or 1 / self.scale
        return replace(recipe, objective=replace(recipe.objective, teacher_temperature=temperature))


def find_teacher(recipe: Recipe, model: ClipConfig, storage: Storage) -> Taught | None:
    """The recipe's teacher, opened once for the whole run: a checkpoint is verified by that. model: the student.

    Raises UserError when there is no such teacher, or its features have a width that `distill_features` can't compare.
    """
    objective = recipe.objective
    if objective.teacher is None:
        return None
    if objective.teacher == STORED:
        found = stored_by(recipe, model.image_size, storage)
        taught, width = Taught(found["scale"], passes=int(found["passes"])), found.get("width")
    else:
        beside = open_teacher(objective.teacher)
        taught, width = Taught(beside.source.scale, beside), beside.config.embed_dim
    if width is not None:  # manifests once didn't say it; the first step compares widths too
        check_widths(objective, model.embed_dim, width)
    return taught


def stored_by(recipe: Recipe, image_size: int, storage: Storage) -> dict[str, Any]:
    """What the manifests of the training shards say of the teacher whose features are stored in them.

    Raises UserError where they say nothing or don't agree, or were written for other crops and captions than this run's.
    """
    if recipe.data.weights is not None:
        raise UserError(
            "`objective.teacher` is `stored`, which needs one set of training shards; leave out `data.weights`"
        )
    shards = named_shards(recipe.data.train_shards, storage)
    if shards.twice:
        raise UserError(
            f"`objective.teacher` is `stored`, and several of the training shards are called {shards.twice}: crops and captions follow a "
            "shard's name, so these would be others than the features are of. Rename the shards that they were written from until no two are "
            "called the same, and write them anew together with tools/reinforce_shards.py"
        )
    found = _agreed(shards.locations, storage)
    now = drawn_by(recipe.data, recipe.train.seed, image_size)
    if different := next((key for key, value in now.items() if found["drawn_by"].get(key) != value), None):
        raise UserError(
            f"the teacher's features are of crops and captions with {different}={found['drawn_by'].get(different)}, and this run has "
            f"{now[different]}; take the same, or write them anew with tools/reinforce_shards.py"
        )
    return found


def _agreed(shards: list[str], storage: Storage) -> dict[str, Any]:
    """What the manifests of all folders say of the teacher. Raises UserError where they aren't the same, or leave a shard out."""
    said: dict[str, dict[str, Any]] = {}
    listed = set()
    for folder, manifest in manifests_beside(shards, storage).items():
        teacher = manifest.get("teacher") if manifest else None
        if manifest is None or teacher is None:
            raise UserError(
                f"`objective.teacher` is `stored`, and the manifest of the training shards in {folder} says no teacher; write its features "
                "with tools/reinforce_shards.py"
            )
        said[folder] = teacher
        listed |= {(folder, entry["name"]) for entry in manifest["shards"]}
    if unlisted := next((x for x in shards if (folder_of(x), x.rpartition("/")[2]) not in listed), None):
        raise UserError(
            f"`objective.teacher` is `stored`, and the manifest beside {unlisted} says nothing of it: it was added or renamed since; write the "
            "shards anew with tools/reinforce_shards.py"
        )
    (first, found), *others = said.items()
    for folder, teacher in others:
        one, other = _flat(found), _flat(teacher)
        if key := next((key for key in one | other if one.get(key) != other.get(key)), None):
            raise UserError(
                f"the teacher's features in {folder} are with {key}={other.get(key)}, and those in {first} with {one.get(key)}; write both "
                "with the same, best as one set, with tools/reinforce_shards.py"
            )
    return found


def _flat(teacher: dict[str, Any]) -> dict[str, Any]:
    """By one key each."""
    return {key: x for key, x in teacher.items() if key != "drawn_by"} | dict(teacher["drawn_by"])


def drawn_by(data: DataSection, seed: int, image_size: int) -> dict[str, Any]:
    """All that decides what crop and caption of a sample a pass shows, as JSON."""
    return {"train.seed": seed, "image_size": image_size} | {f"data.{key}": getattr(data, key) for key in DRAWN_BY}
