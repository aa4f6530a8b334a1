"""The manifest beside shards: which there are, how long, with how many samples; written aside and renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from dsclip.data.sources.storage import LOCAL, MissingSource, SourceError, Storage, is_remote
from dsclip.errors import UserError
from dsclip.files import sha256, write_whole

MANIFEST = "manifest.json"
FORMAT = "dsclip-shards-1"
MAX_MANIFEST_BYTES = 1 << 30


class _Hash(TypedDict, total=False):
    sha256: str


class Entry(_Hash):
    """A shard in a manifest."""

    name: str
    samples: int
    bytes: int


class Labels(TypedDict, total=False):
    """What a manifest may say beyond its shards. base: where they lie, if not beside it. teacher: whose features are in the samples, and of what."""

    classes: list[str] | None
    templates: list[str] | None
    base: str
    teacher: dict[str, Any]


class Manifest(Labels):
    """manifest.json."""

    format: str
    samples: int
    shards: list[Entry]


def read_manifest(shards: list[str], storage: Storage = LOCAL) -> Manifest | None:
    """The manifest beside the first shard, or None."""
    return _manifest_in(folder_of(str(shards[0])), storage)


def manifests_beside(shards: list[str], storage: Storage = LOCAL) -> dict[str, Manifest | None]:
    """Of each folder that has some of the shards, in their order; None where there is none."""
    return {folder: _manifest_in(folder, storage) for folder in dict.fromkeys(map(folder_of, shards))}


def _manifest_in(folder: str, storage: Storage) -> Manifest | None:
    path = f"{folder}/{MANIFEST}"
    if not is_remote(path) and not os.path.isfile(path):
        return None
    try:
        return load_manifest(path, storage)
    except FileNotFoundError:
        return None


def manifest_sha256(shards: list[str], storage: Storage = LOCAL) -> str | None:
    """Of the manifest beside the first shard, or None where there is none."""
    path = f"{folder_of(str(shards[0]))}/{MANIFEST}"
    try:
        return sha256(storage.read_all(path, MAX_MANIFEST_BYTES) if is_remote(path) else Path(path))
    except (FileNotFoundError, NotADirectoryError, SourceError):
        return None


def load_manifest(path: str, storage: Storage) -> Manifest:
    """Raises UserError when it is damaged, FileNotFoundError when a remote one isn't there."""
    try:
        content = storage.read_all(path, MAX_MANIFEST_BYTES)
    except MissingSource as error:
        raise FileNotFoundError(path) from error
    except SourceError as error:
        raise UserError(f"the manifest can't be read: {error}") from error
    try:
        manifest: Manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {manifest['format']!r}; this version of dsclip reads {FORMAT!r}")
        for entry in manifest["shards"]:
            name, samples, size = entry["name"], entry["samples"], entry["bytes"]
            whole = all(type(x) is int and 0 <= x < 1 << 62 for x in (samples, size))
            if not (isinstance(name, str) and whole) or ".." in name.split("/"):
                raise ValueError(f"shard {name!r}")
        return manifest
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run tools/index_shards.py") from error


class Listed(NamedTuple):
    """What a manifest says of a shard, and the folder of that manifest, where the shard's index lies too."""

    entry: Entry
    folder: str


def listed_shards(path: str, storage: Storage) -> dict[str, Listed]:
    """The shards of a manifest, by location; none where there is no manifest."""
    if not is_remote(path) and not os.path.isfile(path):
        return {}
    try:
        content = load_manifest(path, storage)
    except FileNotFoundError:
        return {}
    folder = folder_of(path)
    base = content.get("base") or folder
    return {f"{base}/{entry['name']}": Listed(entry, folder) for entry in content["shards"]}


def folder_of(location: str) -> str:
    """What a location lies in."""
    return location.rpartition("/")[0] or "."


def write_manifest(folder: Path, entries: list[Entry], labels: Labels | None = None) -> None:
    """Writes the manifest aside, then renames it: it is whole, or absent."""
    manifest = {"format": FORMAT, "samples": sum(e["samples"] for e in entries), "shards": entries, **(labels or {})}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
