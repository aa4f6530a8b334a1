"""Folders that are whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsclip.errors import UserError


@contextmanager
def whole_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `out` to write to, which takes its name when all went well.

    Raises UserError when `out` exists with content and `overwrite` is not set.
    """
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another folder or remove it")
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if out.exists():
        shutil.rmtree(out)
    os.rename(temporary, out)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
