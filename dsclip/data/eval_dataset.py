"""Evaluation data: a fixed list of samples, the same on every rank, with CLIP's exact preprocessing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from dsclip.data.reader import (
    BadSample,
    RawSample,
    decode_image,
    read_captions,
    read_label,
    read_negatives,
    read_shard,
)  # fmt: skip
from dsclip.data.shard_cache import local_copy
from dsclip.data.shards import LOCAL, read_manifest, resolve_shards
from dsclip.data.sources import Reader, SourceError, is_remote
from dsclip.data.transforms import eval_image
from dsclip.errors import UserError


@dataclass(frozen=True)
class _Entry:
    raw: RawSample  # compressed bytes: an evaluation set of 50,000 images takes a few GB
    captions: list[str]
    negatives: list[str]
    label: int | None


class EvalDataset:
    """Indexed samples: ds[i] is {"image": uint8 [3, S, S], "captions": [str], "label": int or None}."""

    def __init__(self, entries: list[_Entry], bad: Counter, image_size: int, max_pixels: int, manifest: dict | None):
        self._entries, self._image_size, self._max_pixels = entries, image_size, max_pixels
        self.bad = bad
        self.classes: list[str] | None = (manifest or {}).get("classes")
        self.templates: list[str] | None = (manifest or {}).get("templates")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> dict:
        entry = self._entries[index]
        image = eval_image(decode_image(entry.raw, self._max_pixels), self._image_size)
        return {"image": image, "captions": entry.captions, "label": entry.label}

    @property
    def captions(self) -> list[list[str]]:
        """All captions of all samples, without decoding an image."""
        return [entry.captions for entry in self._entries]

    @property
    def negatives(self) -> list[list[str]]:
        """All hard-negative captions of all samples, without decoding an image."""
        return [entry.negatives for entry in self._entries]

    @property
    def labels(self) -> list[int | None]:
        """All class labels, without decoding an image."""
        return [entry.label for entry in self._entries]

    def images(self, start: int, stop: int) -> torch.Tensor:
        """uint8 images [stop - start, 3, S, S]."""
        return torch.stack([self[i]["image"] for i in range(start, stop)])


def build_eval_dataset(
    shards: str | list[str],
    *,
    image_size: int,
    max_samples: int | None = None,
    caption_key: str = "caption",
    negative_key: str = "negatives",
    max_image_pixels: int = 64_000_000,
    reader: Reader = LOCAL,
) -> EvalDataset:
    """Reads the shards once, in order. Samples that can't be decoded are left out and counted in `.bad`.

    reader: how remote shards are read. Raises UserError when shards are missing or nothing in them is usable.
    """
    locations = resolve_shards(shards, reader)
    try:
        paths = [local_copy(p, reader, -1) if is_remote(p) else p for p in locations]
    except SourceError as error:
        raise UserError(f"evaluation shards can't be read: {error}") from error
    bad: Counter = Counter()
    entries: list[_Entry] = []
    for path in paths:
        for raw in read_shard(path, bad):
            try:
                label = read_label(raw)
                captions = _captions_or_none(raw, caption_key, label)
                decode_image(raw, max_image_pixels)  # a broken image must not be found in the middle of a collective
                entries.append(_Entry(raw, captions, read_negatives(raw, negative_key), label))
            except BadSample as reason:
                bad[str(reason)] += 1
            if max_samples and len(entries) == max_samples:
                return EvalDataset(entries, bad, image_size, max_image_pixels, read_manifest(locations, reader))
    if not entries:
        reasons = ", ".join(f"{n} {reason}" for reason, n in bad.items()) or "they are empty"
        raise UserError(f"no usable sample in {_names(paths)} ({reasons})")
    return EvalDataset(entries, bad, image_size, max_image_pixels, read_manifest(locations, reader))


def _captions_or_none(raw: RawSample, caption_key: str, label: int | None) -> list[str]:
    try:
        return read_captions(raw, caption_key)
    except BadSample:
        if label is None:
            raise
        return []  # a labelled image needs no caption


def _names(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (" ..." if len(paths) > 3 else "")
