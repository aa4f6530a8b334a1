"""The manifest beside shards: which there are, how long, with how many samples; written aside and renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dsclip.data.sources.storage import LOCAL, MissingSource, SourceError, Storage, is_remote
from dsclip.errors import UserError
from dsclip.files import write_whole

MANIFEST = "manifest.json"
FORMAT = "dsclip-shards-1"
MAX_MANIFEST_BYTES = 1 << 30


def read_manifest(shards: list[str], storage: Storage = LOCAL) -> dict | None:
    """The manifest beside the first shard, or None."""
    path = f"{_folder(str(shards[0]))}/{MANIFEST}"
    if not is_remote(path) and not os.path.isfile(path):
        return None
    try:
        return _load_manifest(path, storage)
    except FileNotFoundError:
        return None


def _load_manifest(path: str, storage: Storage) -> dict:
    """Raises UserError when it is damaged, FileNotFoundError when a remote one isn't there."""
    try:
        content = storage.read_all(path, MAX_MANIFEST_BYTES)
    except MissingSource as error:
        raise FileNotFoundError(path) from error
    except SourceError as error:
        raise UserError(f"the manifest can't be read: {error}") from error
    try:
        manifest = json.loads(content)
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


def _entries(path: str, storage: Storage) -> dict[str, dict]:
    """What a manifest says of each shard, by location; nothing where there is no manifest."""
    if not is_remote(path) and not os.path.isfile(path):
        return {}
    try:
        content = _load_manifest(path, storage)
    except FileNotFoundError:
        return {}
    base = content.get("base") or _folder(path)
    return {f"{base}/{entry['name']}": entry | {"folder": _folder(path)} for entry in content["shards"]}


def _folder(location: str) -> str:
    return location.rpartition("/")[0] or "."


def write_manifest(folder: Path, entries: list[dict], **more) -> None:
    """Writes the manifest aside, then renames it: it is whole, or absent."""
    manifest = {"format": FORMAT, "samples": sum(e["samples"] for e in entries), "shards": entries, **more}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
