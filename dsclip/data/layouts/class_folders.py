"""One folder of images a class, as torchvision's ImageFolder reads it, also below folders that are splits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dsclip.data.decoding.sample import IMAGE_EXTENSIONS

SPLITS = ("train", "val", "valid", "validation", "test")


class ClassFolders(NamedTuple):
    """folders: the classes, in the order of their numbers; images: {split: [(file, class number)]}, the split "" where there are none."""

    folders: list[str]
    images: dict[str, list[tuple[str, int]]]


def is_image(name: str) -> bool:
    """By its extension, one of a JPEG, PNG or WebP file."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def find_class_folders(names: list[str], elsewhere: Iterable[str] = ()) -> ClassFolders | None:
    """The class folders among the names of files; None where images don't lie in folders.

    elsewhere: classes of splits whose files aren't among them. A class is the last folder above an image. Folders whose names are all whole numbers are in the order of these, others in
    that of their names; a class has the same number in every split.
    """
    images = [n for n in names if "/" in n and is_image(n)]
    parts = [n.split("/") for n in images]
    depth = next((d for d in (0, 1) if parts and all(len(p) > d + 1 and p[d] in SPLITS for p in parts)), None)
    if not images or any(len(p) < (2 if depth is None else depth + 3) for p in parts):
        return None
    folders = sorted({p[-2] for p in parts}.union(elsewhere))
    if all(folder.isdecimal() for folder in folders):
        folders.sort(key=int)
    number = {folder: i for i, folder in enumerate(folders)}
    splits: dict[str, list[tuple[str, int]]] = {}
    for name, p in zip(images, parts, strict=True):
        splits.setdefault("" if depth is None else p[depth], []).append((name, number[p[-2]]))
    return ClassFolders(folders, splits)
