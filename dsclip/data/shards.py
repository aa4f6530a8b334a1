"""Shard sets: webdataset tar files with a manifest beside them; how they are named, written and found."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import braceexpand
import numpy as np

from dsclip.data.sources import MissingSource, Reader, SourceError, is_remote
from dsclip.data.tar_index import SUFFIX, scan, scan_file, to_bytes
from dsclip.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "dsclip-shards-1"
MAX_MANIFEST_BYTES = 1 << 30
LOCAL = Reader()
DEMO = ("demo", "demo:train", "demo:val")
MAX_SHARDS = 2_000_000  # a brace expression can name more files than memory holds


@dataclass(frozen=True)
class ShardSet:
    """Shards with what their manifests say. samples, shard_bytes int64 [S]; shard_bytes is −1 where no manifest tells."""

    locations: list[str]
    samples: np.ndarray
    shard_bytes: np.ndarray
    problems: dict[str, int]  # of shards without a manifest, found while their samples were counted
    indexes: list[str]  # the folder of each shard's manifest, where its index lies too, or its own
    hashes: list[str | None]  # SHA-256 by the manifest
    repeats: dict[int, int] = field(default_factory=dict)  # see `told_apart`

    def name(self, shard: int) -> str:
        """What messages call it: its folder and file."""
        return short_name(self.locations[shard])

    def identity(self, shard: int) -> str:
        """What the randomness of its samples depends on, wherever the set lies: its file's name.

        The word before it is the demo's folder, which was part of the name once: so the demo's numbers are what they were.
        """
        return f"train{self.repeats.get(shard, '')}/{self.locations[shard].rpartition('/')[2]}"


def told_apart(sets: list[ShardSet]) -> list[ShardSet]:
    """The sets with their `repeats`: which shards have a file name that others before them have, and how many."""
    seen: Counter = Counter()
    result = []
    for shards in sets:
        repeats = {}
        for number, location in enumerate(shards.locations):
            file = location.rpartition("/")[2]
            if seen[file]:
                repeats[number] = seen[file]
            seen[file] += 1
        result.append(replace(shards, repeats=repeats))
    return result


def short_name(location: str) -> str:
    """The last folder and the file name."""
    return "/".join(location.split("/")[-2:])


def resolve_shards(spec: str | list[str], reader: Reader = LOCAL) -> list[str]:
    """The locations of the shards that `spec` names, sorted within each part.

    spec: a folder, a glob, a brace expression (`data/{00000..00099}.tar`), a manifest, the https://, s3:// or gs:// address
    of one of these but a glob, several joined by `::`, a list of these, or `demo` and `demo:val` for the embedded data
    set. Raises UserError that names what can't be found.
    """
    shards = [location for part in _parts(spec) for location in _resolve_part(part, reader)]
    if not shards:
        raise UserError("no shards are named; set data.train_shards to a folder, a glob or a brace expression")
    return shards


def _parts(spec: str | list[str]) -> list[str]:
    return [p.strip() for s in ([spec] if isinstance(spec, str) else spec) for p in s.split("::")]


def _resolve_part(part: str, reader: Reader) -> list[str]:
    if part in DEMO:
        from dsclip.data.demo import demo_folder

        return _resolve_part(str(demo_folder() / ("val" if part == "demo:val" else "train")), reader)
    remote = is_remote(part)
    if "{" in part:
        return [p if remote else _existing(p) for p in _expand(part)]
    if part.endswith(".json"):
        return _listed(part, reader)
    if remote:
        return [part] if part.endswith(".tar") else _listed(part.rstrip("/") + "/" + MANIFEST, reader)
    if os.path.isdir(part):
        part = part.rstrip("/") or "/"
        found = sorted(p for p in glob.glob(os.path.join(glob.escape(part), "*.tar")) if os.path.isfile(p))
        if not found:
            listed = os.path.join(part, MANIFEST)  # an index of shards that lie elsewhere
            if os.path.isfile(listed) and _load_manifest(listed, reader).get("base"):
                return _listed(listed, reader)
            raise UserError(f"{part} holds no .tar shards; write some with tools/make_shards.py")
        return found
    if any(c in part for c in "*?["):
        found = sorted(glob.glob(part))
        if not found:
            raise UserError(f"no file matches {part}")
        return found
    return [_existing(part)]


def _listed(manifest: str, reader: Reader) -> list[str]:
    """The shards that a manifest lists."""
    try:
        content = _load_manifest(manifest, reader)
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


def open_shards(spec: str | list[str], reader: Reader = LOCAL) -> ShardSet:
    """The shards with their numbers of samples: from the manifests beside them, else counted by walking local shards.

    Raises UserError when remote shards have no manifest, or when there is no sample at all.
    """
    locations = resolve_shards(spec, reader)
    known: dict[str, dict] = {}
    # A manifest that is named, or lies in a named folder, may list shards that lie elsewhere; others list their neighbours.
    named = [p.rstrip("/") or "/" for p in _parts(spec) if p not in DEMO]
    for path in [p if p.endswith(".json") else f"{p}/{MANIFEST}" for p in named if _is_index(p)]:
        listed = _entries(path, reader)
        if missing := sorted(listed.keys() - set(locations)):
            raise UserError(
                f"{path} lists {len(missing)} shards that are not there: {', '.join(missing[:3])}. Copy them again, or write the "
                "manifest anew with tools/index_shards.py"
            )
        known |= listed
    for folder in {_folder(x) for x in locations if x not in known}:
        known |= _entries(f"{folder}/{MANIFEST}", reader)
    samples, sizes, problems, indexes, hashes = [], [], {}, [], []
    for location in locations:
        entry = known.get(location)
        if entry is None:
            if is_remote(location):
                raise UserError(
                    f"{location} has no manifest beside it that lists it; make one with "
                    f"tools/index_shards.py {_folder(location)} OUT and train on OUT"
                )
            try:
                index = scan_file(location)
            except OSError as error:
                raise UserError(f"shard {location} can't be read: {error.strerror}") from error
            entry = {"samples": len(index), "bytes": -1}
            for reason, count in index.problems.items():
                problems[reason] = problems.get(reason, 0) + count
        samples.append(entry["samples"])
        sizes.append(entry["bytes"])
        indexes.append(entry.get("folder") or _folder(location))
        hashes.append(entry.get("sha256"))
    counts, shard_bytes = np.array(samples, dtype=np.int64), np.array(sizes, dtype=np.int64)
    return told_apart([ShardSet(locations, counts, shard_bytes, problems, indexes, hashes)])[0]


def _is_index(part: str) -> bool:
    return part.endswith(".json") or os.path.isdir(part)


def _entries(path: str, reader: Reader) -> dict[str, dict]:
    """What a manifest says of each shard, by location; nothing where there is no manifest."""
    if not is_remote(path) and not os.path.isfile(path):
        return {}
    try:
        content = _load_manifest(path, reader)
    except FileNotFoundError:
        return {}
    base = content.get("base") or _folder(path)
    return {f"{base}/{entry['name']}": entry | {"folder": _folder(path)} for entry in content["shards"]}


def _folder(location: str) -> str:
    return location.rpartition("/")[0] or "."


def read_manifest(shards: list[str], reader: Reader = LOCAL) -> dict | None:
    """The manifest beside the first shard, or None."""
    path = f"{_folder(str(shards[0]))}/{MANIFEST}"
    if not is_remote(path) and not os.path.isfile(path):
        return None
    try:
        return _load_manifest(path, reader)
    except FileNotFoundError:
        return None


def _load_manifest(path: str, reader: Reader) -> dict:
    """Raises UserError when it is damaged, FileNotFoundError when a remote one isn't there."""
    try:
        content = reader.read_all(path, MAX_MANIFEST_BYTES)
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


def write_manifest(folder: Path, entries: list[dict], **more) -> None:
    """Writes the manifest aside, then renames it: it is whole, or absent."""
    manifest = {"format": FORMAT, "samples": sum(e["samples"] for e in entries), "shards": entries, **more}
    temporary = folder / (MANIFEST + ".tmp")
    temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)


class ShardWriter:
    """Writes samples into numbered tar shards of a folder, byte for byte the same for the same samples.

    Use as a context manager: leaving it without an error writes the manifest, which makes the set complete.
    """

    def __init__(
        self, folder: Path, shard_size: int, *, classes: list[str] | None = None, templates: list[str] | None = None
    ):
        self.folder, self._shard_size = Path(folder), shard_size
        self._classes, self._templates = classes, templates
        self._entries: list[dict] = []
        self._tar: tarfile.TarFile | None = None
        self._in_shard = 0

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """One sample: members by extension, such as {"jpg": ..., "txt": ...}."""
        if self._tar is None:
            name = f"{len(self._entries):05d}.tar"
            self._tar = tarfile.open(self.folder / (name + ".tmp"), "w", format=tarfile.USTAR_FORMAT)
            self._entries.append({"name": name})
        for extension, content in sorted(members.items()):
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(content), 0o644
            self._tar.addfile(info, io.BytesIO(content))
        self._in_shard += 1
        if self._in_shard == self._shard_size:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        entry = self._entries[-1]
        temporary, final = self.folder / (entry["name"] + ".tmp"), self.folder / entry["name"]
        content = temporary.read_bytes()
        entry |= {"samples": self._in_shard, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        index = scan(io.BytesIO(content), len(content))
        final.with_name(final.name + SUFFIX).write_bytes(to_bytes(index))
        os.replace(temporary, final)
        self._tar, self._in_shard = None, 0

    def __exit__(self, error_type, error, trace) -> None:
        if error_type is not None:
            if self._tar is not None:
                self._tar.close()
            return
        self._finish_shard()
        write_manifest(self.folder, self._entries, classes=self._classes, templates=self._templates)
