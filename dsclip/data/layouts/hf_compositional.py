"""Compositional sets as the hub serves them, by the columns of their tables.

Winoground     image_0, image_1, caption_0, caption_1, and tag or collapsed_tag
ARO's orders   an image, correct_caption, and hard_text_1, hard_text_2, …: the caption with its words in other orders
ARO's others   an image, true_caption, false_caption
WinoGAViL      cue, candidates (names), associations (those of them that belong to the cue), candidate_images
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from dsclip.data.layouts.rows import FileLayout, Row
from dsclip.errors import UserError

WINOGROUND = ("image_0", "image_1", "caption_0", "caption_1")
WINOGAVIL = ("cue", "candidates", "associations", "candidate_images")
# A column of captions, and the columns of their hard negatives.
OWN_CAPTIONS = {"correct_caption": r"hard_text_\d+", "true_caption": r"false_caption"}
Names = Callable[[int, int, int], str]  # (row, which of the image columns, which of its images) to the image's name


def compositional_columns(columns: list[str], image: str | None) -> list[str] | None:
    """The columns with the images of a compositional set; None for another set. image: the one column of images, if there is one."""
    if set(WINOGROUND) <= set(columns):
        return ["image_0", "image_1"]
    if set(WINOGAVIL) <= set(columns):
        return ["candidate_images"]
    return [image] if image is not None and _own_caption(columns) else None


def compositional_layout(table: Any, name: Names, spec: str) -> FileLayout:
    """The rows of a compositional set; the caller knows its images. Raises UserError that names the row that is damaged."""
    columns = list(table.column_names)
    if set(WINOGROUND) <= set(columns):
        return FileLayout(rows=[row for pair in _winoground(table, name, spec) for row in pair], pairs=True)
    if set(WINOGAVIL) <= set(columns):
        return _winogavil(table, name, spec)
    own = _own_caption(columns)
    wrong = [c for c in columns if re.fullmatch(OWN_CAPTIONS[own], c)]
    texts = zip(*(table[column] for column in (own, *wrong)), strict=True)
    rows = [
        Row(name(i, 0, 0), [_text(said[0], spec, i)], None, tuple(_text(t, spec, i) for t in said[1:]))
        for i, said in enumerate(texts)
    ]
    return FileLayout(rows=rows)


def _own_caption(columns: list[str]) -> str:
    """The column of captions beside which there are hard negatives; "" where there is none."""
    return next(
        (own for own, wrong in OWN_CAPTIONS.items() if own in columns and any(re.fullmatch(wrong, c) for c in columns)),
        "",
    )


def _winoground(table: Any, name: Names, spec: str) -> Iterator[tuple[Row, Row]]:
    tags = next((c for c in ("collapsed_tag", "tag") if c in table.column_names), None)
    of_tag = table[tags] if tags else [None] * len(table)
    for i, (first, second, tag) in enumerate(zip(table["caption_0"], table["caption_1"], of_tag, strict=True)):
        first, second, group = _text(first, spec, i), _text(second, spec, i), None if tag is None else str(tag)
        yield (
            Row(name(i, 0, 0), [first], None, (second,), group),
            Row(name(i, 1, 0), [second], None, (first,), group),
        )


def _winogavil(table: Any, name: Names, spec: str) -> FileLayout:
    """A row a candidate. A picture of the same name is the same picture, which is embedded once."""
    layout, place = FileLayout(cues=True), dict[str, str]()
    columns = (table[column] for column in ("cue", "candidates", "associations"))
    for i, (cue, candidates, associations) in enumerate(zip(*columns, strict=True)):
        of_cue = [
            Row(place.setdefault(shown, name(i, 0, j)), [_text(cue, spec, i)], int(shown in associations), group=str(i))
            for j, shown in enumerate(candidates)
        ]
        if any(row.label for row in of_cue):
            layout.rows += of_cue
        else:
            layout.left_out["no association among the candidates"] += 1
    return layout


def _text(value: object, spec: str, row: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{spec}: row {row} is damaged: it lacks a text")
    return value.strip()
