"""What a layout of image files says of each of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dsclip.data.layouts.files import FileSet

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the file


class Row(NamedTuple):
    """A sample. label: its class; negatives: hard negatives of its captions; group: the part of the set; box: what to crop to."""

    name: str
    captions: list[str]
    label: int | None = None
    negatives: tuple[str, ...] = ()
    group: str | None = None
    box: Box | None = None


@dataclass
class Words:
    """Class names and templates that a set brings along, and which of its splits it is."""

    classes: list[str] | None = None
    templates: list[str] | None = None
    split: str | None = None


@dataclass
class FileLayout(Words):
    """Image files, which `files` reads. left_out: rows and files that can't be used, by reason.

    pairs: rows 2i and 2i + 1 belong together, each the other's hard negative in image and caption. cues: a row is a candidate for its caption,
    which all rows of its group have, and its label is 1 where it is one of the caption's associations, or else 0.
    """

    files: FileSet | Path = Path()
    rows: list[Row] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    pairs: bool = False
    cues: bool = False
