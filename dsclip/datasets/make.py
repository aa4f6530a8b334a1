"""Turns a folder or zip of images into shards: with a captions.tsv, or with one folder a class."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from PIL import Image

from dsclip.data.decoding.sample import IMAGE_EXTENSIONS, BadSample, RawSample, decode_image
from dsclip.data.decoding.tokenizer import Tokenizer, load_tokenizer
from dsclip.data.layouts.caption_table import CAPTIONS, read_table
from dsclip.data.layouts.class_folders import SPLITS, find_class_folders
from dsclip.data.layouts.files import FileSet
from dsclip.data.shards.manifest import MANIFEST
from dsclip.data.shards.writer import ShardWriter
from dsclip.datasets.ready_recipe import RECIPE, Made, folder_of, write_recipe
from dsclip.datasets.train_tokenizer import train_tokenizer
from dsclip.errors import UserError

CLASS_TEMPLATE = "a photo of a {}."
MAX_PIXELS = 64_000_000
JPEG_QUALITY = 92
HOLDOUT = 0.1  # of sets without splits of their own
MEASURED_CAPTIONS = 2000  # for the context length of the recipe


@dataclass
class Summary:
    """What was written: samples by split, and what was left out by reason."""

    samples: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    classes: list[str] | None = None
    tokenizer: str | None = None
    recipe: str | None = None
    held_out: float | None = None  # share of the images; None where the source has splits of its own
    sides: list[int] = field(default_factory=list, repr=False)  # of the images as they are stored

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


@dataclass(frozen=True)
class _Item:
    name: str
    captions: list[str]
    label: int | None = None


def make_shards(
    source: Path,
    out: Path,
    *,
    shard_size: int = 1000,
    holdout: float | None = None,
    size: int | None = None,
    tokenizer_size: int | None = None,
    tokenizer: str | None = None,
    encoding: str = "utf-8",
) -> Summary:
    """Writes shards of everything in `source` below `out`, with a recipe; raises UserError when there is nothing to write.

    captions.tsv (filepath<TAB>caption, several rows an image allowed) gives image-caption pairs; class folders, labelled
    images. Where `source` has splits of its own (train/, val/, test/) they are kept, and a holdout is refused; otherwise
    that share of the images, by a hash of the path, becomes `val` (None: a tenth) and the rest `train`; 0 keeps all in
    one set. size: resize the shorter side to this, if it is larger, and store JPEG. tokenizer_size: train a tokenizer with
    so many tokens on the captions (not those of a held-out split), in `out`/tokenizer; tokenizer: the recipe uses this
    one. encoding: of captions.tsv. Each sample's .json has its captions and image_id, a hash that equal image files share.
    """
    if tokenizer is not None:
        load_tokenizer(tokenizer)  # one that is missing is an error now
    files = FileSet(source)
    summary = Summary()
    tables = [n for n in files.names if PurePosixPath(n).name == CAPTIONS]
    splits = _from_captions(files, tables, encoding, summary) if tables else _from_classes(files, summary)
    summary.held_out = (HOLDOUT if holdout is None else holdout) if set(splits) == {""} else None
    splits = _split(files, splits, holdout)
    for name in ("", *splits):
        _refuse_existing(folder_of(out, name))
    for name, items in splits.items():
        if items:
            summary.samples[name] = _write(files, items, folder_of(out, name), shard_size, size, summary)
    if not sum(summary.samples.values()):
        raise UserError(f"{source}: no image could be used ({summary.skipped or 'there are none'})")
    trained_on = [items for split, items in splits.items() if split in ("", "train")] or list(splits.values())
    captions = [caption for items in trained_on for item in items for caption in item.captions]
    if tokenizer_size is not None:
        summary.tokenizer = str(out / "tokenizer")
        train_tokenizer(captions, out / "tokenizer", tokenizer_size)
    used = tokenizer or summary.tokenizer
    tokens = _usual_length(load_tokenizer(used), captions) if used else 0
    side = sorted(summary.sides)[len(summary.sides) // 2]
    recipe = write_recipe(Made(out, summary.samples, summary.classes is not None, side, tokens, used or "demo"))
    summary.recipe = None if recipe is None else str(recipe)
    return summary


def _usual_length(tokenizer: Tokenizer, captions: list[str]) -> int:
    """Tokens that 99 of 100 captions don't exceed, of a few looked at."""
    step = max(1, len(captions) // MEASURED_CAPTIONS)
    ids = tokenizer(captions[::step], 77)
    lengths = (ids == tokenizer.eot_token_id).int().argmax(dim=1).sort().values + 1
    return int(lengths[(len(lengths) * 99) // 100])


def _refuse_existing(folder: Path) -> None:
    if (folder / MANIFEST).exists() or (folder / RECIPE).exists() or list(folder.glob("*.tar")):
        raise UserError(f"{folder} holds shards already; choose another folder or remove them")


def _split(files: FileSet, splits: dict[str, list[_Item]], holdout: float | None) -> dict[str, list[_Item]]:
    """The source's own splits, or a share of its images held out."""
    if set(splits) != {""}:
        if holdout:
            names = ", ".join(f"{name}/" for name in splits)
            raise UserError(
                f"{files.path} has splits of its own ({names}), which --holdout would mix; leave it out, or give one of these "
                "folders as SRC"
            )
        return splits
    holdout = HOLDOUT if holdout is None else holdout
    if not holdout:
        return splits
    parts: dict[str, list[_Item]] = {"train": [], "val": []}
    for item in splits[""]:
        share = int.from_bytes(blake2b(item.name.encode(), digest_size=8).digest(), "big") / 2**64
        parts["val" if share < holdout else "train"].append(item)
    return parts


def _from_captions(files: FileSet, tables: list[str], encoding: str, summary: Summary) -> dict[str, list[_Item]]:
    """By split: one table, or one in each split's folder."""
    folders = [PurePosixPath(table).parent.name for table in tables]
    if len(tables) > 1 and (len(set(folders)) < len(folders) or any(f not in SPLITS for f in folders)):
        raise UserError(
            f"{files.path} has {len(tables)} files {CAPTIONS} ({', '.join(tables[:3])}); keep one, or one in each of train/, "
            "val/ and test/"
        )
    splits = {}
    for table, folder in zip(tables, folders, strict=True):
        captions = read_table(files.read(table), table, encoding, set(files.names), summary.skip)
        splits[folder if len(tables) > 1 else ""] = [_Item(name, texts) for name, texts in captions.items()]
    return splits


def _from_classes(files: FileSet, summary: Summary) -> dict[str, list[_Item]]:
    found = find_class_folders(files.names)
    if found is None:
        raise UserError(
            f"{files.path} has no {CAPTIONS} and no folders of images; it needs one or the other (see docs/data.md)"
        )
    summary.classes = [c.replace("_", " ") for c in found.folders]
    captions = [CLASS_TEMPLATE.replace("{}", name) for name in summary.classes]
    return {
        split: [_Item(name, [captions[label]], label) for name, label in images]
        for split, images in found.images.items()
    }


def _write(
    files: FileSet, items: list[_Item], folder: Path, shard_size: int, size: int | None, summary: Summary
) -> int:
    # By a hash, so that a shard is a mixture of classes; file names are often sorted by class.
    items = sorted(items, key=lambda item: blake2b(item.name.encode()).digest())
    templates = [CLASS_TEMPLATE] if summary.classes else None
    written = 0
    with ShardWriter(folder, shard_size, classes=summary.classes, templates=templates) as writer:
        for item, members in _usable(files, items, size, summary):
            caption = item.captions if len(item.captions) > 1 else item.captions[0]
            text = {"caption": caption, "image_id": members.pop("image_id").decode()}
            members["json"] = json.dumps(text, ensure_ascii=False).encode()
            if item.label is not None:
                members["cls"] = str(item.label).encode()
            writer.write(f"{written:08d}", members)
            written += 1
    return written


def _usable(
    files: FileSet, items: list[_Item], size: int | None, summary: Summary
) -> Iterator[tuple[_Item, dict[str, bytes]]]:
    for item in items:
        extension = item.name.rpartition(".")[2].lower()
        if extension not in IMAGE_EXTENSIONS:
            summary.skip("not an image")
            continue
        content = files.read(item.name)
        try:
            image = decode_image(RawSample("", item.name, {extension: content}), MAX_PIXELS)
        except BadSample as reason:
            summary.skip(str(reason))
            continue
        image_id = blake2b(content, digest_size=8).hexdigest().encode()
        if size is not None and min(image.size) > size:
            extension, content = "jpg", _resized(image, size)
        summary.sides.append(min(*image.size, size or image.width))
        yield item, {extension: content, "image_id": image_id}


def _resized(image: Image.Image, size: int) -> bytes:
    scale = size / min(image.size)
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()
