"""How a folder of files becomes a checkpoint: its manifest is written, all of it is on the disk, then it gets its name.

Needs no other rank and nothing of the training, so that the process that writes can do it too.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from dsclip.files import on_disk, sha256, write_whole
from dsclip.saving.files import Problem, problem_of
from dsclip.saving.hashed_file import FileEntry


class Commit(TypedDict):
    """What is to be done, as JSON holds it. written: files by their path in the folder, which are on the disk and hashed.

    manifest: the name of the file with `content` and what the folder holds; final: the folder's name from then on; old: checkpoints
    that go once this one is there.
    """

    folder: str
    final: str
    manifest: str
    content: dict[str, Any]
    written: dict[str, FileEntry]
    old: list[str]


class Committed(NamedTuple):
    """What became of it. aside: folders that count no more and can be removed at leisure."""

    problem: Problem | None
    aside: list[str]
    seconds: float


def commit(order: Commit) -> Committed:
    """Makes the checkpoint, or says why it can't; then what is under the final name is what was there before."""
    started = time.monotonic()
    folder, final = Path(order["folder"]), Path(order["final"])
    try:
        write_manifest_file(folder, order["manifest"], order["content"], order["written"])
        aside = _replace(final, folder)
    except OSError as error:
        return Committed(problem_of(error, Path(error.filename or folder)), [], time.monotonic() - started)
    for old in map(Path, order["old"]):
        with contextlib.suppress(OSError):  # it stays until the next time
            # Half removed, it must not look complete; and the step may be saved again meanwhile.
            aside.append(old.rename(old.with_name(old.name + ".removed.tmp")))
    return Committed(None, [str(path) for path in aside], time.monotonic() - started)


def write_manifest_file(folder: Path, name: str, content: dict[str, Any], written: Mapping[str, FileEntry]) -> None:
    """Writes `name` into the folder: content, and under `files` the size and SHA-256 of every other file.

    written: files that are on the disk and hashed, maybe by others who share the folder: over NFS they may not be seen here yet. The rest
    is brought to the disk and hashed here, and so are the folders.
    """
    entries = dict(written)
    inside = sorted(folder.rglob("*"))
    for path in inside:
        relative = path.relative_to(folder).as_posix()
        if path.is_file() and relative not in entries and relative != name:
            on_disk(path)  # a manifest never outlives what it lists, power cuts included
            entries[relative] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_whole(folder / name, json.dumps({**content, "files": dict(sorted(entries.items()))}, indent=1))
    for path in (*(p for p in inside if p.is_dir()), folder):
        on_disk(path)


def remove_folders(folders: list[str]) -> None:
    """What `Committed.aside` names."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _replace(final: Path, folder: Path) -> list[Path]:
    """Gives the folder its name, also on the disk; returns where the one that stood there is now, if one did."""
    old = final.with_name(final.name + ".old.tmp")
    there = final.exists()
    if there:
        final.rename(old)
    folder.rename(final)
    on_disk(final.parent)
    return [old] if there else []
