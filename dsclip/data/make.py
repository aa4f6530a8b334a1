"""Turns a folder or zip of images into shards: with a captions.tsv, or with one folder a class."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from PIL import Image

from dsclip.data.reader import IMAGE_EXTENSIONS, BadSample, RawSample, decode_image
from dsclip.data.shards import MANIFEST, ShardWriter
from dsclip.data.train_tokenizer import train_tokenizer
from dsclip.errors import UserError

CAPTIONS = "captions.tsv"
SPLIT_NAMES = ("train", "val", "valid", "validation", "test")
CLASS_TEMPLATE = "a photo of a {}."
MAX_PIXELS = 64_000_000
JPEG_QUALITY = 92


@dataclass
class Summary:
    """What was written: samples by split, and what was left out by reason."""

    samples: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    classes: list[str] | None = None
    tokenizer: str | None = None

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


class Source:
    """The files of a folder or of a zip, which is read in memory: nothing is ever extracted to a path it names."""

    def __init__(self, path: Path):
        self.path = path
        self._zip = None
        if path.is_dir():
            self.names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        elif zipfile.is_zipfile(path):
            self._zip = zipfile.ZipFile(path)
            self.names = sorted(n for n in self._zip.namelist() if not n.endswith("/"))
        else:
            raise UserError(f"{path} is neither a folder nor a zip file")
        self.names = [n for n in self.names if not any(part.startswith((".", "__MACOSX")) for part in n.split("/"))]

    def read(self, name: str) -> bytes:
        return self._zip.read(name) if self._zip else (self.path / name).read_bytes()


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
    holdout: float = 0.0,
    size: int | None = None,
    tokenizer_size: int | None = None,
) -> Summary:
    """Writes shards of everything in `source` below `out`; raises UserError when there is nothing to write.

    captions.tsv (filepath<TAB>caption, several rows an image allowed) gives image-caption pairs, split into `train` and
    `val` by a hash of the path when `holdout` is a share. Class folders, also below train/ and test/, become one set a
    split, with labels. size: resize the shorter side to this, if it is larger, and store JPEG. tokenizer_size: also
    train a tokenizer with so many tokens on the captions (not those of a held-out split), in `out`/tokenizer.
    """
    files = Source(source)
    summary = Summary()
    captions = [n for n in files.names if PurePosixPath(n).name == CAPTIONS]
    if captions:
        splits = _from_captions(files, captions[0], holdout, summary)
    else:
        splits = _from_classes(files, holdout, summary)
    for name, items in splits.items():
        if items:
            folder = out / name if name else out
            _refuse_existing(folder)
            summary.samples[name or "all"] = _write(files, items, folder, shard_size, size, summary)
    if not sum(summary.samples.values()):
        raise UserError(f"{source}: no image could be used ({summary.skipped or 'there are none'})")
    if tokenizer_size is not None:
        seen = [items for split, items in splits.items() if split in ("", "train")] or list(splits.values())
        folder = out / "tokenizer"
        train_tokenizer(
            (caption for items in seen for item in items for caption in item.captions), folder, tokenizer_size
        )
        summary.tokenizer = str(folder)
    return summary


def _refuse_existing(folder: Path) -> None:
    if (folder / MANIFEST).exists() or list(folder.glob("*.tar")):
        raise UserError(f"{folder} holds shards already; choose another folder or remove them")


def _split_of(name: str, holdout: float) -> str:
    if not holdout:
        return ""
    share = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
    return "val" if share < holdout else "train"


def _from_captions(files: Source, table: str, holdout: float, summary: Summary) -> dict[str, list[_Item]]:
    captions: dict[str, list[str]] = {}
    known, base = set(files.names), PurePosixPath(table).parent
    text = files.read(table).decode("utf-8", errors="replace")
    reader = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(reader, [])
    if "filepath" not in header or "caption" not in header:
        raise UserError(f"{table}: the first line must be `filepath<TAB>caption`, and it is {header!r}")
    path_column, caption_column = header.index("filepath"), header.index("caption")
    for row in reader:
        if len(row) <= max(path_column, caption_column) or not row[caption_column].strip():
            summary.skip("no caption")
            continue
        name = (base / row[path_column]).as_posix()
        if name not in known:
            summary.skip("missing image")
            continue
        captions.setdefault(name, []).append(row[caption_column].strip())
    splits: dict[str, list[_Item]] = {}
    for name, sentences in captions.items():
        splits.setdefault(_split_of(name, holdout), []).append(_Item(name, sentences))
    return splits


def _from_classes(files: Source, holdout: float, summary: Summary) -> dict[str, list[_Item]]:
    images = [n for n in files.names if n.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "/" in n]
    parts = [PurePosixPath(n).parts for n in images]
    depth = next((d for d in (0, 1) if parts and all(len(p) > d + 1 and p[d] in SPLIT_NAMES for p in parts)), None)
    if not images or any(len(p) < (2 if depth is None else depth + 3) for p in parts):
        raise UserError(
            f"{files.path} has no {CAPTIONS} and no folders of images; it needs one or the other (see docs/data.md)"
        )
    class_at = -2
    classes = sorted({p[class_at] for p in parts})
    summary.classes = [c.replace("_", " ") for c in classes]
    splits: dict[str, list[_Item]] = {}
    for name, p in zip(images, parts, strict=True):
        label = classes.index(p[class_at])
        caption = CLASS_TEMPLATE.replace("{}", summary.classes[label])
        split = p[depth] if depth is not None else _split_of(name, holdout)
        splits.setdefault(split, []).append(_Item(name, [caption], label))
    return splits


def _write(files: Source, items: list[_Item], folder: Path, shard_size: int, size: int | None, summary: Summary) -> int:
    # By a hash, so that a shard is a mixture of classes; file names are often sorted by class.
    items = sorted(items, key=lambda item: blake2b(item.name.encode()).digest())
    templates = [CLASS_TEMPLATE] if summary.classes else None
    written = 0
    with ShardWriter(folder, shard_size, classes=summary.classes, templates=templates) as writer:
        for item, members in _usable(files, items, size, summary):
            if len(item.captions) == 1:
                members["txt"] = item.captions[0].encode()
            else:
                members["json"] = json.dumps({"caption": item.captions}, ensure_ascii=False).encode()
            if item.label is not None:
                members["cls"] = str(item.label).encode()
            writer.write(f"{written:08d}", members)
            written += 1
    return written


def _usable(files: Source, items: list[_Item], size: int | None, summary: Summary) -> Iterator[tuple[_Item, dict]]:
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
        if size is not None and min(image.size) > size:
            extension, content = "jpg", _resized(image, size)
        yield item, {extension: content}


def _resized(image: Image.Image, size: int) -> bytes:
    scale = size / min(image.size)
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()
