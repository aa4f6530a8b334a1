"""What an evaluation set is: shards, CLIP_benchmark's folders of shards, a table, a compositional set, or one folder of images a class."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dsclip.data.layouts.caption_table import CAPTIONS, is_table, read_table
from dsclip.data.layouts.class_folders import SPLITS, find_class_folders, is_image
from dsclip.data.layouts.compositional import read_compositional
from dsclip.data.layouts.files import FileSet
from dsclip.data.layouts.hf_dataset import PREFIX, holds_hf_dataset, open_hf_dataset
from dsclip.data.layouts.rows import FileLayout, Row, Words
from dsclip.data.layouts.words import CLASSNAMES, TEMPLATES, beside, folder_names, within
from dsclip.data.shards.manifest import MANIFEST
from dsclip.data.shards.specification import DEMO, resolve_shards
from dsclip.data.sources.storage import Storage, is_remote
from dsclip.errors import NoSuchSplit, UserError

HELD_OUT = ("test", "val", "validation", "valid")  # which split is taken when none is asked for
COUNT = "nshards.txt"  # of CLIP_benchmark's layout: its shards are 0.tar, 1.tar, …
KIND = "dataset_type.txt"


@dataclass
class ShardLayout(Words):
    """Shards. captions_by_line: a .txt member has one caption a line (CLIP_benchmark's retrieval sets)."""

    locations: list[str] = field(default_factory=list)
    captions_by_line: bool = False


def recognise(
    spec: str | list[str],
    storage: Storage,
    *,
    split: str | None = None,
    caption_column: str | None = None,
    images: str | None = None,
) -> ShardLayout | FileLayout:
    """What `spec` names; no image is read. split: of a set that has several, by default the one that is held out.

    images: the folder or zip with the images of a compositional set, where they aren't beside it. caption_column: of a table, if it has another name than the usual ones. Raises UserError for what can't be found or recognised.
    """
    if found := _compositional(spec, images):
        _refuse_split(split, spec)
        return found
    if images is not None:
        raise UserError(f"{spec} says itself where its images are; leave the folder of images out")
    if isinstance(spec, str) and spec.startswith(PREFIX):
        return open_hf_dataset(spec, split, caption_column, _chosen)
    path = _plain_path(spec)
    if path is None:
        _refuse_split(split, spec)
        return ShardLayout(locations=resolve_shards(spec, storage))
    if os.path.isdir(path):
        if shards := _shards_in(path, split, storage):
            return shards
        if holds_hf_dataset(path):
            return open_hf_dataset(PREFIX + path, split, caption_column, _chosen)
        return _folder(path, split, caption_column)
    if is_table(path):
        _refuse_split(split, spec)
        return _table_file(path, caption_column)
    return _files(FileSet(Path(path)), split, caption_column)


def _compositional(spec: str | list[str], images: str | None) -> FileLayout | None:
    path = spec if isinstance(spec, str) else spec[0] if len(spec) == 1 else ""
    return read_compositional(Path(path), images) if os.path.exists(path) else None


def _plain_path(spec: str | list[str]) -> str | None:
    """The folder, zip or table that is named; None for what names shards."""
    path = spec if isinstance(spec, str) else spec[0] if len(spec) == 1 else ""
    if not path or "::" in path or path in DEMO or is_remote(path):
        return None
    if os.path.isfile(path) and not path.endswith(".json") and not tarfile.is_tarfile(path):
        if not path.lower().endswith((".zip", ".tsv", ".csv", ".tar")):
            raise UserError(
                f"{path} is no evaluation set: neither a tar shard, nor a zip, nor a table of captions (.tsv, .csv)"
            )
        return None if path.endswith(".tar") else path
    return path if os.path.isdir(path) else None


def _refuse_split(split: str | None, spec: object) -> None:
    if split is not None:
        raise NoSuchSplit(f"{spec} has no splits to choose {split!r} from")


def _chosen(splits: list[str], asked: str | None, path: object) -> str:
    """The split that is asked for, or the one that is held out."""
    choice = asked or next((name for name in HELD_OUT if name in splits), None)
    if choice is None or choice not in splits:
        problem = f"no split {asked!r}" if asked else "no split that is held out"
        raise NoSuchSplit(f"{path} has {problem}; choose one with split ({', '.join(sorted(splits))})", splits)
    return choice


def _shards_in(path: str, asked: str | None, storage: Storage) -> ShardLayout | None:
    """The shards of a folder, or of the folder of one of its splits; None where it has none."""
    own = _holds_shards(path)
    splits = [] if own else [s for s in (*SPLITS, *filter(None, [asked])) if _holds_shards(os.path.join(path, s))]
    if not own and not splits:
        return None
    if own:
        _refuse_split(asked, path)
    split = None if own else _chosen(splits, asked, path)
    folder = path if split is None else os.path.join(path, split)
    kind = beside(folder, (KIND,)) or [""]
    return ShardLayout(
        beside(folder, (CLASSNAMES,)), beside(folder, TEMPLATES), split,
        _numbered_shards(folder) or resolve_shards(folder, storage), kind[0].lower() == "retrieval",
    )  # fmt: skip


def _holds_shards(folder: str) -> bool:
    if not os.path.isdir(folder):
        return False
    return os.path.isfile(os.path.join(folder, MANIFEST)) or any(name.endswith(".tar") for name in os.listdir(folder))


def _numbered_shards(folder: str) -> list[str] | None:
    """In the order of their numbers, as many as the folder says it has; None where it doesn't. Raises UserError for missing ones."""
    path = os.path.join(folder, COUNT)
    if not os.path.isfile(path):
        return None
    text = Path(path).read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"\d{1,7}", text) or int(text) == 0:
        raise UserError(f"{path} must hold the number of shards, and holds {text[:40]!r}")
    return resolve_shards([os.path.join(folder, f"{i}.tar") for i in range(int(text))])


def _folder(path: str, asked: str | None, caption_column: str | None) -> FileLayout:
    """Of a folder that holds folders of splits alone, only one is listed: the training images of ImageNet take half a minute."""
    with os.scandir(path) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".")]
    folders = [entry.name for entry in seen if entry.is_dir()]
    if set(folders) - set(SPLITS) or not folders or any(is_table(entry.name) for entry in seen):
        return _files(FileSet(Path(path)), asked, caption_column)
    split = _chosen(folders, asked, path)
    files = FileSet(Path(path), split)
    others = {
        name for folder in folders for name in os.listdir(os.path.join(path, folder)) if _is_class(path, folder, name)
    }
    return _files(files, split, caption_column, others)


def _is_class(path: str, split: str, name: str) -> bool:
    return not name.startswith(".") and os.path.isdir(os.path.join(path, split, name))


def _files(files: FileSet, asked: str | None, caption_column: str | None, elsewhere: Iterable[str] = ()) -> FileLayout:
    tables = [n for n in files.names if n.endswith(CAPTIONS) and n.rpartition("/")[2] == CAPTIONS]
    tables = tables or [n for n in files.names if "/" not in n and is_table(n)]
    if tables:
        return _table_within(files, tables, asked, caption_column)
    found = find_class_folders(files.names, elsewhere)
    if found is None:
        raise UserError(f"{files.path} is no evaluation set: {_what(files)}")
    if set(found.images) == {""}:
        _refuse_split(asked, files.path)
        split = None
    else:
        split = _chosen(list(found.images), asked, files.path)
    classes = folder_names(found.folders, within(files, (CLASSNAMES,)), str(files.path))
    rows = [Row(name, [], label) for name, label in found.images[split or ""]]
    return FileLayout(classes, within(files, TEMPLATES), split, files, rows, _not_images(files, split))


def _not_images(files: FileSet, split: str | None) -> Counter[str]:
    """Files among the images that aren't read, by reason."""
    among = (n for n in files.names if "/" in n and (split is None or split in n.split("/")[:2]))
    return Counter("no JPEG, PNG or WebP file" for n in among if not is_image(n))


def _what(files: FileSet) -> str:
    """What was found instead, and what would be read."""
    images = sum(map(is_image, files.names))
    return (
        f"it holds {len(files.names)} files, {images} of them images, and neither shards (*.tar, or test/*.tar), nor "
        f"{CAPTIONS} or another table of captions, nor one folder of images a class (see docs/evaluation.md)"
    )


def _table_within(files: FileSet, tables: list[str], asked: str | None, caption_column: str | None) -> FileLayout:
    by_split = {table.rpartition("/")[0].rpartition("/")[2]: table for table in tables}
    split = None
    if len(tables) == 1 and (asked is None or asked in by_split):
        table, split = tables[0], asked
    elif len(by_split) == len(tables) and all(name in SPLITS for name in by_split):
        split = _chosen(list(by_split), asked, files.path)
        table = by_split[split]
    else:
        if len(tables) == 1:
            _refuse_split(asked, files.path)
        raise UserError(f"{files.path} has {len(tables)} tables ({', '.join(tables[:3])}); name the one you mean")
    left_out: Counter[str] = Counter()
    captions = read_table(
        files.read(table), table, "utf-8", set(files.present), lambda reason: left_out.update([reason]), caption_column
    )
    return FileLayout(None, None, split, files, [Row(name, texts) for name, texts in captions.items()], left_out)


def _table_file(path: str, caption_column: str | None) -> FileLayout:
    """A table that is named itself: its paths are relative to its folder, or absolute."""
    left_out: Counter[str] = Counter()
    content = Path(path).read_bytes()
    captions = read_table(content, path, "utf-8", None, lambda reason: left_out.update([reason]), caption_column)
    rows = []
    for name, texts in captions.items():
        if os.path.isfile(name):
            rows.append(Row(name, texts))
        else:
            left_out["missing image"] += len(texts)
    return FileLayout(files=Path(), rows=rows, left_out=left_out)
