"""Opening an evaluation set: its layout is recognised, its texts are read, and no image is."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dsclip.data.decoding.sample import (
    BadSample,
    RawSample,
    check_part_key,
    read_captions,
    read_label,
    read_label_set,
    read_negatives,
    read_part,
)
from dsclip.data.evaluation.dataset import EvalDataset, Prepare
from dsclip.data.evaluation.texts import read_texts
from dsclip.data.layouts.recognise import ShardLayout, recognise
from dsclip.data.layouts.rows import FileLayout
from dsclip.data.shards.manifest import read_manifest
from dsclip.data.sources.storage import LOCAL, SourceError, Storage
from dsclip.errors import UserError


@dataclass(frozen=True)
class _Reading:
    """How the texts of a shard's samples are read."""

    caption_key: str
    negative_key: str
    group_key: str | None
    captions_by_line: bool

    def captions(self, raw: RawSample, labelled: bool) -> list[str]:
        """Raises BadSample, unless it has a label."""
        try:
            captions = read_captions(raw, self.caption_key)
        except BadSample:
            if not labelled:
                raise
            return []  # a labelled image needs no caption
        if not self.captions_by_line:
            return captions
        return [line.strip() for text in captions for line in text.splitlines() if line.strip()]


def build_eval_dataset(
    spec: str | list[str],
    *,
    image_size: int,
    max_samples: int | None = None,
    caption_key: str = "caption",
    negative_key: str = "negatives",
    group_key: str | None = None,
    split: str | None = None,
    images: str | None = None,
    max_image_pixels: int = 64_000_000,
    storage: Storage = LOCAL,
    prepare: Prepare | None = None,
) -> EvalDataset:
    """Opens an evaluation set (see `recognise`): texts and places of its first `max_samples`, in order; of image files with
    classes as many in even steps. No image is read or decoded.

    caption_key: of captions in .json members, or the column of a table. group_key: of the part of the set that a sample is of. split: of a
    set that has several, by default the one that is held out. images: folder or zip with the images of a compositional set. storage: how remote shards are read.
    prepare: another preprocessing than CLIP's for image_size. Samples without an image or with texts that can't be read are left out
    and counted in `.bad`, as are those whose image can't be decoded, later. Raises UserError when nothing is found, it isn't recognised, or
    nothing in it is usable.
    """
    check_part_key(group_key)
    dataset = EvalDataset(image_size, max_image_pixels, storage, prepare)
    with _collection_paused():
        column = None if caption_key == "caption" else caption_key
        layout = recognise(spec, storage, split=split, caption_column=column, images=images)
        dataset.classes, dataset.templates, dataset.split = layout.classes, layout.templates, layout.split
        if isinstance(layout, FileLayout):
            dataset.add_files(layout, max_samples)
        else:
            _add_shards(
                dataset, layout, max_samples, _Reading(caption_key, negative_key, group_key, layout.captions_by_line)
            )
    if not len(dataset):
        reasons = ", ".join(f"{n} {reason}" for reason, n in dataset.bad.items()) or "they are empty"
        raise UserError(f"no usable sample in {_names(dataset.shards) or spec} ({reasons})")
    return dataset


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Python's cyclic collector looks at all of a growing list again and again: a third of the time of opening."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _add_shards(dataset: EvalDataset, layout: ShardLayout, most: int | None, reading: _Reading) -> None:
    dataset.shards = layout.locations
    for location in layout.locations:
        _add_shard(dataset, location, most, reading)
        if most and len(dataset) == most:
            break
    if manifest := read_manifest(layout.locations, dataset.storage):
        dataset.classes = layout.classes or manifest.get("classes")
        dataset.templates = layout.templates or manifest.get("templates")


def _add_shard(dataset: EvalDataset, location: str, most: int | None, reading: _Reading) -> None:
    try:
        path = dataset.path(location)
        for sample in read_texts(path, dataset.left_out):
            try:
                label, label_set = read_label(sample.raw), read_label_set(sample.raw)
                captions = reading.captions(sample.raw, label is not None or label_set is not None)
                negatives, group = (
                    read_negatives(sample.raw, reading.negative_key),
                    read_part(sample.raw, reading.group_key),
                )
                dataset.add(sample, location, captions, negatives, label, group, label_set)
            except BadSample as reason:
                dataset.left_out[str(reason)] += 1
            if most and len(dataset) == most:
                return
    except SourceError as error:
        raise UserError(f"evaluation shards can't be read: {error}") from error
    except OSError as error:
        raise UserError(f"evaluation shard {location} can't be read: {error.strerror}") from error


def _names(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (" ..." if len(paths) > 3 else "")
