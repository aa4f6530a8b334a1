"""What a user writes to name shards: folders, globs, brace expressions, manifests, addresses."""

from __future__ import annotations

import glob
import os
import re

import braceexpand

from dsclip.data.shards.manifest import MANIFEST, load_manifest
from dsclip.data.sources.storage import LOCAL, Storage, is_remote
from dsclip.embedded import embedded_folder
from dsclip.errors import UserError

DEMO = ("demo", "demo:train", "demo:val")
MAX_SHARDS = 2_000_000  # a brace expression can name more files than memory holds


def resolve_shards(spec: str | list[str], storage: Storage = LOCAL) -> list[str]:
    """The locations of the shards that `spec` names, sorted within each part.

    spec: a folder, a glob, a brace expression (`data/{00000..00099}.tar`), a manifest, the https://, s3:// or gs:// address
    of one of these but a glob, several joined by `::`, a list of these, or `demo` and `demo:val` for the embedded data
    set. Raises UserError that names what can't be found.
    """
    shards = [location for part in parts_of(spec) for location in _resolve_part(part, storage)]
    if not shards:
        raise UserError("no shards are named; set data.train_shards to a folder, a glob or a brace expression")
    return shards


def parts_of(spec: str | list[str]) -> list[str]:
    """What is joined by `::` or listed, one by one."""
    return [p.strip() for s in ([spec] if isinstance(spec, str) else spec) for p in s.split("::")]


def _resolve_part(part: str, storage: Storage) -> list[str]:
    name, _, split = part.partition(":")
    if part in DEMO and (folder := embedded_folder(name)):
        return _resolve_part(str(folder / (split or "train")), storage)
    remote = is_remote(part)
    if "{" in part:
        return [p if remote else _existing(p) for p in _expand(part)]
    if part.endswith(".json"):
        return _listed(part, storage)
    if remote:
        return [part] if part.endswith(".tar") else _listed(part.rstrip("/") + "/" + MANIFEST, storage)
    if os.path.isdir(part):
        part = part.rstrip("/") or "/"
        shards = sorted(p for p in glob.glob(os.path.join(glob.escape(part), "*.tar")) if os.path.isfile(p))
        if not shards:
            listed = os.path.join(part, MANIFEST)  # an index of shards that lie elsewhere
            if os.path.isfile(listed) and load_manifest(listed, storage).get("base"):
                return _listed(listed, storage)
            raise UserError(f"{part} holds no .tar shards; write some with tools/make_shards.py")
        return shards
    if any(c in part for c in "*?["):
        files = sorted(glob.glob(part))
        if not files:
            raise UserError(f"no file matches {part}")
        return files
    return [_existing(part)]


def _listed(manifest: str, storage: Storage) -> list[str]:
    """The shards that a manifest lists."""
    try:
        content = load_manifest(manifest, storage)
    except FileNotFoundError:
        raise UserError(
            f"there is no {manifest}; name the shards (…/{{00000..00099}}.tar) in tools/index_shards.py, which makes one"
        ) from None
    base = content.get("base") or manifest.rpartition("/")[0] or "."
    return [f"{base}/{entry['name']}" for entry in content["shards"]]


def _existing(path: str) -> str:
    if not os.path.isfile(path):
        raise UserError(f"shard {path} does not exist")
    return path


def _expand(part: str) -> list[str]:
    count = 1
    for low, high in re.findall(r"\{(-?\d+)\.\.(-?\d+)", part):
        count *= abs(int(high) - int(low)) + 1
    if count > MAX_SHARDS:
        raise UserError(f"{part} names {count:,} shards; {MAX_SHARDS:,} are the most that make sense")
    try:
        return list(braceexpand.braceexpand(part))
    except ValueError as error:
        raise UserError(f"{part} is no valid brace expression ({error})") from error
