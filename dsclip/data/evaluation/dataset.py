"""Evaluation data: a fixed list of samples, the same on every rank, with CLIP's exact preprocessing.

An image is decoded when it is asked for, on the rank that embeds it; one that can't be is
found there, and `evaluate.features` has all ranks leave it out.
"""

from __future__ import annotations

import copy
import itertools
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypedDict
from zipfile import BadZipFile

from PIL import Image
from torch import Tensor

from dsclip.data.corruptions.corruption import Corruption
from dsclip.data.decoding.sample import (
    BadSample,
    RawSample,
    decode_image,
)
from dsclip.data.decoding.transforms import eval_image
from dsclip.data.evaluation.place import ImagePlace, read_part_of, shard_state
from dsclip.data.evaluation.texts import TextSample
from dsclip.data.layouts.files import FileSet
from dsclip.data.layouts.rows import FileLayout, Row
from dsclip.data.sources.cache import local_copy
from dsclip.data.sources.storage import SourceError, Storage, is_remote
from dsclip.files import sha256

Prepare = Callable[[Image.Image], Tensor]  # what becomes of a decoded RGB picture


class EvalSample(TypedDict):
    """One sample. image: uint8 [3, S, S]; label: its class, None where it has none."""

    image: Tensor
    captions: list[str]
    label: int | None


class EvalDataset:
    """Samples by their number, see `EvalSample`.

    captions, negatives (lists of strings), labels (int or None), label_sets (several classes, or None) and groups (parts of the set, or None) are those of all samples, in
    order. pairs: samples 2i and 2i + 1 are each other's hard negatives. cues: samples are candidates, see `FileLayout`. broken: {index: reason} of samples whose image turned out
    to be unusable. corruption: what its pictures went through, see `corrupted`.
    """

    corruption: Corruption | None = None

    def __init__(self, image_size: int, max_pixels: int, storage: Storage, prepare: Prepare | None = None):
        self._image_size, self._max_pixels, self.storage = image_size, max_pixels, storage
        self._prepare = prepare or partial(eval_image, size=image_size)
        self._images: list[ImagePlace] = []
        self._files: FileSet | None = None  # that images are files of
        self._copies: dict[str, str] = {}
        self.captions: list[list[str]] = []
        self.negatives: list[list[str]] = []
        self.labels: list[int | None] = []
        self.groups: list[str | None] = []
        self.label_sets: list[tuple[int, ...] | None] = []
        self.pairs = self.cues = False
        self.left_out: Counter[str] = Counter()  # when the shards were opened
        self.broken: dict[int, str] = {}
        self.classes: list[str] | None = None
        self.templates: list[str] | None = None
        self.split: str | None = None  # of a set that has several
        self.shards: list[str] = []  # where its samples lie, if in shards

    def __len__(self) -> int:
        return len(self._images)

    @property
    def bad(self) -> Counter[str]:
        """Samples that were left out so far, by reason."""
        return self.left_out + Counter(self.broken.values())

    def __getitem__(self, index: int) -> EvalSample:
        return {"image": self.image(index), "captions": self.captions[index], "label": self.labels[index]}

    def image(self, index: int) -> Tensor:
        """uint8 [3, S, S], or as `prepare` makes it; several threads may ask at once. Raises BadSample."""
        place = self._images[index]
        try:
            content = self.file(index)
        except (OSError, SourceError, BadZipFile, EOFError, zlib.error) as error:
            raise BadSample("unreadable shard" if place.size >= 0 else "unreadable file") from error
        raw = RawSample(place.location, "", {place.extension: content})
        image = decode_image(raw, self._max_pixels)
        image = image if place.box is None else image.crop(place.box)
        return self._prepare(image if self.corruption is None else self.corruption(image, index))

    def corrupted(self, corruption: Corruption) -> EvalDataset:
        """The same samples, their pictures corrupted before they are prepared for the model."""
        other = copy.copy(self)
        other.corruption, other.broken = corruption, {}
        return other

    def fingerprint(self) -> str:
        """Changes with the images: a hash of their places and corruption, and of sizes and times of change of the files that they lie in."""
        names = self.shards or sorted({place.location for place in self._images})
        states = [shard_state(name) for name in names] if self._files is None else self._files.state(names)
        pieces = (repr(tuple(place)).encode() for place in self._images)
        corruption = () if self.corruption is None else (repr(self.corruption).encode(),)
        return sha256(itertools.chain((repr(states).encode(),), corruption, pieces))

    def shared_images(self, other: EvalDataset) -> int:
        """How many of its images are images of the other set too: the same file, or part of a shard, by its place."""
        theirs = set(other._places())
        return sum(place in theirs for place in self._places())

    def _places(self) -> Iterator[tuple[str, str, int]]:
        """(folder, file, start in it) of each image, links to folders followed."""
        root, folders = "" if self._files is None else self._files.root(), dict[str, str]()
        for image in self._images:
            folder, name = os.path.split(image.location)
            if folder not in folders:
                folders[folder] = folder if is_remote(folder) else os.path.realpath(os.path.join(root, folder))
            yield folders[folder], name, image.start

    def blank(self) -> Tensor:
        """A black image, in the place of one that can't be decoded."""
        return self._prepare(Image.new("RGB", (self._image_size, self._image_size)))

    def file(self, index: int) -> bytes:
        """The image's file, undecoded. Raises OSError, SourceError, or what zipfile raises."""
        return self._read(self._images[index])

    def _read(self, place: ImagePlace) -> bytes:
        if place.size < 0:
            return Path(place.location).read_bytes() if self._files is None else self._files.read(place.location)
        try:
            return read_part_of(self.path(place.location), place)
        except FileNotFoundError:
            if place.location not in self._copies:
                raise
            del self._copies[place.location]  # the copy gave way to others
            return read_part_of(self.path(place.location), place)

    def path(self, location: str) -> str:
        """The shard's file, copied here first where it is remote. Raises SourceError."""
        if not is_remote(location):
            return location
        if location not in self._copies:
            self._copies[location] = local_copy(location, self.storage, -1)
        return self._copies[location]

    def add(
        self,
        sample: TextSample,
        location: str,
        captions: list[str],
        negatives: list[str],
        label: int | None,
        group: str | None,
        label_set: tuple[int, ...] | None,
    ) -> None:
        """Appends a sample of a shard."""
        place = ImagePlace(location, sample.extension, sample.start, sample.size)
        self._append(place, captions, negatives, label, group, label_set)

    def add_files(self, layout: FileLayout, most: int | None) -> None:
        """Appends the image files of a layout, the first `most`; of labelled ones, which lie class after class, as many in even steps."""
        files = layout.files
        self._files = files if isinstance(files, FileSet) else None
        self.left_out.update(layout.left_out)
        self.pairs, self.cues = layout.pairs, layout.cues
        for row in _chosen(layout, most):
            location = row.name if isinstance(files, FileSet) else str(files / row.name)
            self._append(
                ImagePlace(location, row.name.rpartition(".")[2].lower(), 0, -1, row.box),
                row.captions,
                list(row.negatives),
                row.label,
                row.group,
            )

    def same_images(self, *, in_any_box: bool = False) -> list[int]:
        """Of each sample the first one that shows the same image, also where another part of it is shown."""
        first: dict[ImagePlace, int] = {}
        images = (image._replace(box=None) if in_any_box else image for image in self._images)
        return [first.setdefault(image, i) for i, image in enumerate(images)]

    def _append(
        self,
        place: ImagePlace,
        captions: list[str],
        negatives: list[str],
        label: int | None,
        group: str | None,
        label_set: tuple[int, ...] | None = None,
    ) -> None:
        self._images.append(place)
        self.groups.append(group)
        self.label_sets.append(label_set)
        self.captions.append(captions)
        self.negatives.append(negatives)
        self.labels.append(label)


def _chosen(layout: FileLayout, most: int | None) -> list[Row]:
    rows, n = layout.rows, len(layout.rows)
    if most is None or most >= n:
        return rows
    if layout.pairs:
        return rows[: most // 2 * 2]
    if layout.cues:  # all candidates of a cue, or none
        return rows[: max((i for i in range(1, most + 1) if rows[i].group != rows[i - 1].group), default=0)]
    if any(row.label is None for row in rows):
        return rows[:most]
    return [rows[i * n // most] for i in range(most)]
