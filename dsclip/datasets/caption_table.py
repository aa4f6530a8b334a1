"""captions.tsv: images and what is said of them."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable
from pathlib import PurePosixPath

from dsclip.errors import UserError

CAPTIONS = "captions.tsv"


def read_tables(
    content: bytes, table: str, encoding: str, known: set[str], skip: Callable[[str], None]
) -> dict[str, list[str]]:
    """{image: captions} of a table `filepath<TAB>caption`, whose paths are relative to it.

    known: files there are; skip(reason) is called for rows that can't be used. Raises UserError for a table without that
    first line, and names the line that is not of this encoding.
    """
    captions: dict[str, list[str]] = {}
    base = PurePosixPath(table).parent
    reader = csv.reader(io.StringIO(_decode(content, table, encoding)), delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(reader, [])
    if "filepath" not in header or "caption" not in header:
        raise UserError(f"{table}: the first line must be `filepath<TAB>caption`, and it is {header!r}")
    path_column, caption_column = header.index("filepath"), header.index("caption")
    for row in reader:
        if len(row) <= max(path_column, caption_column) or not row[caption_column].strip():
            skip("no caption")
            continue
        name = (base / row[path_column]).as_posix()
        if name not in known:
            skip("missing image")
            continue
        captions.setdefault(name, []).append(row[caption_column].strip())
    return captions


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
