"""What makes a folder a checkpoint: `dsclip.json`, written last, with the size and SHA-256 of every other file.

Loading a DeepSpeed checkpoint unpickles it, which is code execution; DeepSpeed itself checks nothing. So every file is
compared with the manifest and scanned for foreign classes before DeepSpeed opens it, and a folder that holds anything
else is refused: DeepSpeed finds its files by pattern. What the check can't see is a folder that someone else changes while
it is being loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypedDict

import torch

from dsclip.engine.state import EngineState
from dsclip.errors import UserError
from dsclip.files import sha256
from dsclip.saving.commit import write_manifest_file
from dsclip.saving.hashed_file import FileEntry

MANIFEST = "dsclip.json"
FORMAT = "dsclip-checkpoint-1"
HASHERS = 8  # files that are hashed at a time

# What DeepSpeed 0.19.8's optimizer files hold beyond tensors and plain containers.
ALLOWED_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


class RunState(TypedDict):
    """What every manifest says of the run at its step. Sections of the recipe and the model by their fields' names."""

    step: int
    samples: int
    world_size: int
    zero_stage: int
    model: dict[str, Any]
    recipe: dict[str, dict[str, Any]]
    engine: EngineState
    data: list[dict[str, Any]]  # the position in the data of each rank


class LaterRunState(RunState, total=False):
    """What earlier versions of dsclip did not write."""

    lineage: dict[str, Any]
    counters: dict[str, Any]


class Manifest(LaterRunState):
    """`dsclip.json`, read. files: by their paths within the folder, with `/`."""

    format: str
    files: dict[str, FileEntry]


# What every manifest says, and of which type.
FIELDS = {
    "step": int, "samples": int, "world_size": int, "zero_stage": int, "model": dict, "recipe": dict, "engine": dict,
    "data": list, "files": dict,
}  # fmt: skip


def content_of(state: LaterRunState) -> dict[str, Any]:
    """All of the manifest but the files."""
    return {"format": FORMAT, **state}


def write_manifest(folder: Path, state: LaterRunState) -> None:
    """Writes the manifest of what the folder holds, which makes it a checkpoint."""
    write_manifest_file(folder, MANIFEST, content_of(state), {})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises UserError when it isn't one."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} is no dsclip checkpoint: it has no {MANIFEST}. Give a folder such as runs/NAME/checkpoints/step_00001000."
        )
    try:
        manifest: Manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); use another checkpoint of the run") from error
    if problem := _problem(manifest):
        raise UserError(f"{path} is damaged ({problem}); use another checkpoint of the run")
    return manifest


def _problem(manifest: object) -> str | None:
    """What is wrong with the manifest itself."""
    if not isinstance(manifest, dict):
        return "it holds no JSON object"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')!r}; this version of dsclip reads {FORMAT!r}"
    for name, kind in FIELDS.items():
        if name not in manifest:
            return f"it has no `{name}`"
        if not isinstance(manifest[name], kind) or isinstance(manifest[name], bool):
            return f"its `{name}` is no {kind.__name__}"
    for name, entry in manifest["files"].items():
        parts = PurePosixPath(name).parts
        if (
            not parts
            or name != "/".join(parts)
            or ".." in parts
            or name.startswith("/")
            or "\\" in name
            or "\0" in name
        ):
            return f"it lists {name!r}, which is no file of the folder"
        sizes = isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        if not sizes:
            return f"its entry for {name} gives no size and SHA-256"
    return None


def verify(folder: Path) -> Manifest:
    """The manifest, after every file was compared with it and scanned. Raises UserError that names the bad file."""
    manifest = read_manifest(folder)
    _refuse_unlisted(folder, manifest["files"].keys())
    # One core hashes more slowly than a disk reads; hashing lets go of the interpreter.
    pool = ThreadPoolExecutor(min(HASHERS, os.cpu_count() or 1), thread_name_prefix="dsclip-verify")
    try:
        problems = pool.map(partial(_damage, folder), manifest["files"], manifest["files"].values())
        for name, problem in zip(manifest["files"], problems, strict=True):
            if problem:
                raise UserError(
                    f"checkpoint {folder} is damaged: {name} {problem}. Use an earlier one of the same run."
                )
            if name.endswith(".pt"):
                _refuse_foreign_classes(folder / name)
    finally:
        pool.shutdown(cancel_futures=True)
    return manifest


def _damage(folder: Path, name: str, entry: FileEntry) -> str | None:
    """What is wrong with a file of the folder."""
    path = folder / name
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"has {path.stat().st_size} bytes instead of {entry['bytes']}"
    return None if sha256(path) == entry["sha256"] else "has changed since it was written (SHA-256 differs)"


def _refuse_unlisted(folder: Path, listed: Collection[str]) -> None:
    """Only plain files that the manifest lists may be there, so that nothing unverified can be loaded."""

    def unreadable(error: OSError) -> NoReturn:
        raise UserError(
            f"checkpoint {folder} can't be checked: {error.filename} can't be listed ({error.strerror}). Nothing was opened; make "
            "the folder readable."
        )

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        for name in (*folders, *files):
            path = Path(parent) / name
            inside = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise UserError(
                    f"checkpoint {folder} holds the link {inside}, and links are not followed. Nothing was opened; copy the "
                    "checkpoint with its files (cp -rL)."
                )
            if name in files and inside not in listed and inside != MANIFEST:
                raise UserError(
                    f"checkpoint {folder} holds {inside}, which {MANIFEST} does not list. Nothing was opened. Remove the file "
                    "if you put it there; otherwise don't trust this checkpoint."
                )


def _refuse_foreign_classes(path: Path) -> None:
    try:
        classes = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:
        raise UserError(f"{path} is not a file that torch.save wrote ({error})") from error
    if foreign := classes - ALLOWED_CLASSES:
        raise UserError(
            f"{path} would run code when loaded: it refers to {', '.join(sorted(foreign))}. It was not opened."
        )
