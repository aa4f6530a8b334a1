"""Class names and templates that lie beside images or shards, and the names of ImageNet's folders."""

from __future__ import annotations

import csv
import os
import re
from functools import cache
from pathlib import Path

from dsclip.data.layouts.files import FileSet, text_lines
from dsclip.errors import UserError

CLASSNAMES = "classnames.txt"
TEMPLATES = ("templates.txt", "zeroshot_classification_templates.txt")  # the second is CLIP_benchmark's
_SYNSET = re.compile(r"n\d{8}")


def beside(folder: str, names: tuple[str, ...]) -> list[str] | None:
    """The lines of the first of these files in a folder or in the one above it; None where there is none."""
    for place in (folder, os.path.dirname(os.path.abspath(folder))):
        for name in names:
            path = os.path.join(place, name)
            if os.path.isfile(path):
                return text_lines(Path(path).read_bytes(), path)
    return None


def within(files: FileSet, names: tuple[str, ...]) -> list[str] | None:
    """As `beside`, for a folder or zip that was listed."""
    if found := next((name for name in names if name in files.present), None):
        return files.lines(found)
    return beside(str(files.path), names) if files.path.is_dir() else None


def folder_names(folders: list[str], lines: list[str] | None, path: str) -> list[str] | None:
    """What the classes are called: as `lines` say, as ImageNet's names where all folders are its, or as their folders.

    lines: one name a class in the order of the folders, or `FOLDER<TAB>NAME`. None for folders that are numbers, which say nothing.
    Raises UserError for lines that don't fit the folders.
    """
    if lines is not None:
        return _named(folders, lines, path)
    if all(_SYNSET.fullmatch(folder) for folder in folders) and not set(folders) - imagenet_names().keys():
        return [imagenet_names()[folder] for folder in folders]
    if all(folder.isdecimal() for folder in folders):
        return None
    return [folder.replace("_", " ") for folder in folders]


def _named(folders: list[str], lines: list[str], path: str) -> list[str]:
    if all("\t" in line for line in lines):
        names = dict(line.split("\t", 1) for line in lines)
        if missing := [folder for folder in folders if folder not in names]:
            raise UserError(f"{path}: {CLASSNAMES} has no line for the folder {missing[0]}")
        return [names[folder].strip() for folder in folders]
    if len(lines) != len(folders):
        raise UserError(
            f"{path}: {CLASSNAMES} has {len(lines)} names and there are {len(folders)} class folders; write one name a line "
            "in the order of the folders, or FOLDER<TAB>NAME"
        )
    return lines


@cache
def imagenet_names() -> dict[str, str]:
    """{folder: name} of ImageNet's 1000 classes, with the names that Radford et al. 2021 chose."""
    content = Path(__file__).with_name("imagenet_classnames.csv").read_text(encoding="utf-8")
    return {row["synset"]: row["name"] for row in csv.DictReader(content.splitlines())}
