"""Makes every sample of a data set as training does, and reports what it finds."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from dsclip.config.data_section import DataSection
from dsclip.data.decoding.prepare import Preparer
from dsclip.data.decoding.sample import BadSample, RawSample, decode_image, image_bytes, read_captions
from dsclip.data.reading.samples import SampleReader
from dsclip.data.shards.shard_set import ShardSet, open_shards
from dsclip.data.sources.storage import SourceError, Storage, is_remote
from dsclip.errors import UserError
from dsclip.files import sha256

SHEET_PAIRS, SHEET_COLUMNS, CELL, TEXT_ROWS = 32, 8, 160, 3
PERCENTILES = (0, 5, 50, 95, 100)


@dataclass
class Report:
    """samples: in the shards; bad {reason: count}; by_shard {shard: {reason: count}}; the rest are distributions."""

    samples: int = 0
    usable: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    by_shard: dict[str, Counter[str]] = field(default_factory=dict)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    image_bytes: list[int] = field(default_factory=list)
    caption_words: list[int] = field(default_factory=list)
    captions: int = 0
    duplicate_images: int = 0
    duplicate_captions: int = 0
    slow_decoded: int = 0
    damage: dict[str, str] = field(default_factory=dict)
    """Shards that can't be read to their end, and what is lost of them: no share of bad samples tells."""

    def problem(self, shard: str, reason: str, count: int = 1) -> None:
        """Counts what is wrong with a shard or one of its samples."""
        self.bad[reason] += count
        self.by_shard.setdefault(shard, Counter())[reason] += count

    def as_dict(self) -> dict[str, Any]:
        """For JSON; distributions as their percentiles."""
        spread = {
            name: _percentiles(getattr(self, name)) for name in ("widths", "heights", "image_bytes", "caption_words")
        }
        worst = sorted(self.by_shard.items(), key=lambda item: -item[1].total())[:20]
        return {
            "samples": self.samples, "usable": self.usable, "bad": dict(self.bad), "captions": self.captions,
            "duplicate_images": self.duplicate_images, "duplicate_captions": self.duplicate_captions, **spread,
            "slow_decoded": self.slow_decoded, "damaged_shards": self.damage,
            "worst_shards": {name: dict(reasons) for name, reasons in worst},
        }  # fmt: skip


def check_data(
    spec: str, storage: Storage, *, data: DataSection | None = None, image_size: int = 224, hard_negatives: bool = False,
    most: int | None = None, sheet: Path | None = None,
) -> Report:  # fmt: skip
    """Makes every sample (or the first `most`) as training does with these `data` settings, once with one crop.

    Writes a contact sheet of 32 pairs spread over them.
    """
    data = data or DataSection()
    shards = open_shards(spec, storage)
    total = int(shards.samples.sum())
    if not total:
        raise UserError(f"there is no sample in {spec}")
    report = Report(samples=total)
    _check_files(shards, storage, report)
    samples = SampleReader(shards, storage, data.max_sample_bytes)
    prepare = Preparer(data, image_size, 0, hard_negatives)
    crop = torch.empty(3, image_size, image_size, dtype=torch.uint8)
    seen_images: set[bytes] = set()
    seen_captions: set[bytes] = set()
    pictures = []
    places = ((s, p) for s, count in enumerate(shards.samples.tolist()) for p in range(count))
    looked = min(total, most or total)
    wanted = set(np.linspace(0, looked - 1, min(looked, SHEET_PAIRS)).astype(int).tolist())
    for number, (shard, position) in enumerate(itertools.islice(places, looked)):
        try:
            raw = samples.read(shard, position)
            prepare(raw, 0, crop)
        except (BadSample, SourceError) as error:
            report.problem(shards.name(shard), str(error) if isinstance(error, BadSample) else "unreadable shard")
            continue
        captions = read_captions(raw, data.caption_key)
        _count(report, raw, captions, seen_images, seen_captions)
        if number in wanted:
            image = decode_image(raw, data.max_image_pixels)
            image.thumbnail((CELL, CELL))
            pictures.append((image, captions[0]))
    report.slow_decoded = prepare.slow_decoded
    if sheet is not None:
        contact_sheet(pictures).save(sheet)
    return report


def _check_files(shards: ShardSet, storage: Storage, report: Report) -> None:
    """Sizes and hashes against the manifest; damage of shards without one."""
    for reason, count in shards.problems.items():
        report.problem("shards without a manifest", reason, count)
    report.damage = {shards.name(number): lost for number, lost in shards.damage.items()}
    for number, location in enumerate(shards.locations):
        recorded = int(shards.shard_bytes[number])
        if recorded < 0:
            continue
        try:
            size = storage.size(location)
        except SourceError:
            report.problem(shards.name(number), "unreadable shard")
            continue
        expected = None if is_remote(location) else shards.hashes[number]
        if size != recorded:
            report.problem(shards.name(number), "size is not the manifest's")
        elif expected and sha256(Path(location)) != expected:
            report.problem(shards.name(number), "content is not the manifest's")


def _count(report: Report, raw: RawSample, captions: list[str], images: set[bytes], sentences: set[bytes]) -> None:
    report.usable += 1
    content = image_bytes(raw)
    with Image.open(io.BytesIO(content)) as image:  # its header
        report.widths.append(image.width)
        report.heights.append(image.height)
    report.image_bytes.append(len(content))
    digest = blake2b(content, digest_size=8).digest()
    report.duplicate_images += digest in images
    images.add(digest)
    for caption in captions:
        report.captions += 1
        report.caption_words.append(len(caption.split()))
        digest = blake2b(caption.strip().lower().encode(), digest_size=8).digest()
        report.duplicate_captions += digest in sentences
        sentences.add(digest)


def _percentiles(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def contact_sheet(pairs: list[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures with the beginning of their captions, 8 a row."""
    rows = -(-len(pairs) // SHEET_COLUMNS) or 1
    height = CELL + 12 * TEXT_ROWS + 8
    sheet = Image.new("RGB", (SHEET_COLUMNS * (CELL + 8), rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(pairs):
        left, top = number % SHEET_COLUMNS * (CELL + 8) + 4, number // SHEET_COLUMNS * height + 4
        sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
        # The built-in font has Latin letters only.
        text = caption.encode("latin-1", "replace").decode("latin-1")
        for row, line in enumerate(textwrap.wrap(text, 27)[:TEXT_ROWS]):
            draw.text((left, top + CELL + 12 * row), line, fill="black")
    return sheet
