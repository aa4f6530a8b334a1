"""Tables of images and what is said of them: tab- or comma-separated, several rows an image allowed."""

from __future__ import annotations

import codecs
import csv
import io
import posixpath
from collections.abc import Callable

from dsclip.errors import UserError

CAPTIONS = "captions.tsv"
# How others call the two columns: OpenCLIP's --csv-img-key and --csv-caption-key have `filepath` and `title`.
PATH_COLUMNS = ("filepath", "image_path", "image", "path", "file_name", "filename", "image_name", "file")
CAPTION_COLUMNS = ("caption", "title", "text", "sentence", "captions")


def is_table(name: str) -> bool:
    """By its extension."""
    return name.lower().endswith((".tsv", ".csv"))


def read_table(
    content: bytes, table: str, encoding: str, known: set[str] | None, skip: Callable[[str], None],
    caption_column: str | None = None,
) -> dict[str, list[str]]:  # fmt: skip
    """{image: captions} of a table whose first line names its columns and whose paths are relative to it.

    known: files there are, None where none is looked for; skip(reason) is called for rows that can't be used. caption_column: its name, if it is
    none of `CAPTION_COLUMNS`. Raises UserError for a table without such columns, and names the line that is not of this encoding.
    """
    captions: dict[str, list[str]] = {}
    base = posixpath.dirname(table)
    text = io.StringIO(_decode(content, table, encoding), newline="")
    if table.lower().endswith(".csv"):
        reader = csv.reader(text)
    else:
        reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    header = [name.strip() for name in next(reader, [])]
    path_at, caption_at = _columns(header, table, caption_column)
    for row in reader:
        if len(row) <= max(path_at, caption_at) or not row[caption_at].strip():
            skip("no caption")
            continue
        name = posixpath.normpath(posixpath.join(base, row[path_at].strip()))
        if known is not None and name not in known:
            skip("missing image")
            continue
        captions.setdefault(name, []).append(row[caption_at].strip())
    return captions


def _columns(header: list[str], table: str, caption_column: str | None) -> tuple[int, int]:
    lower = [name.lower() for name in header]
    path = next((lower.index(name) for name in PATH_COLUMNS if name in lower), None)
    if caption_column is not None and caption_column in header:
        caption: int | None = header.index(caption_column)
    else:
        caption = next((lower.index(name) for name in CAPTION_COLUMNS if name in lower), None)
    if path is None or caption is None:
        separator = "," if table.lower().endswith(".csv") else "<TAB>"
        raise UserError(f"{table}: the first line must be `filepath{separator}caption`, and it is {header!r}")
    return path, caption


def _decode(content: bytes, table: str, encoding: str) -> str:
    try:
        codec = codecs.lookup(encoding).name
    except LookupError:
        raise UserError(f"--encoding {encoding}: there is no such encoding; try latin-1, cp1252 or utf-16") from None
    try:
        return content.decode("utf-8-sig" if codec == "utf-8" else codec)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        text = content.splitlines()[line - 1].decode("latin-1") if line <= len(content.splitlines()) else ""
        raise UserError(
            f"{table}, line {line}: {text[:80]!r} is not {codec}; say what it is, such as --encoding latin-1"
        ) from None
