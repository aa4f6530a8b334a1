"""Indexes and a manifest for shards that exist already, near or far."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from dsclip.data.shards.manifest import read_manifest, write_manifest
from dsclip.data.shards.specification import resolve_shards
from dsclip.data.shards.tar_index import SUFFIX, scan, to_bytes
from dsclip.data.sources.storage import SourceError, Storage, is_remote
from dsclip.errors import UserError

PIECE = 1 << 24


@dataclass
class Indexed:
    """What was found: entries of the manifest, {shard: {reason: count}}, and shards that couldn't be read at all."""

    entries: list[dict] = field(default_factory=list)
    problems: dict[str, dict[str, int]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


def index_shards(spec: str, out: Path | None, storage: Storage, progress=lambda text: None) -> Indexed:
    """Writes a sidecar index for each shard and one manifest for all, beside the shards or in `out`.

    Remote shards are read once from end to end; their indexes go to `out`, with a manifest that points to them. Raises
    UserError when shards of several folders would share a manifest, none can be read, or none holds a sample.
    """
    locations = resolve_shards(spec, storage)
    folders = {location.rpartition("/")[0] or "." for location in locations}
    if len(folders) > 1:
        raise UserError(f"{spec} has shards of {len(folders)} folders; index one folder at a time")
    base = folders.pop()
    if is_remote(base) and out is None:
        raise UserError(f"{base} is remote; give a folder OUT for the indexes and the manifest")
    target = Path(base) if out is None else out
    found = Indexed()
    for number, location in enumerate(locations):
        name = location.rpartition("/")[2]
        progress(f"{number + 1} of {len(locations)}: {name}")
        try:
            entry, problems, index = _index(location, name, storage)
        except SourceError as error:
            found.unreadable[name] = str(error)
            continue
        if entry["samples"]:
            target.mkdir(parents=True, exist_ok=True)
            (target / (name + SUFFIX)).write_bytes(index)
        found.entries.append(entry)
        if problems:
            found.problems[name] = problems
    if not found.entries:
        raise UserError(f"no shard of {spec} could be read ({next(iter(found.unreadable.values()))})")
    if not any(entry["samples"] for entry in found.entries):
        raise UserError(
            f"no file of {spec} holds a sample: {found.entries[0]['name']} is no tar, compressed, or empty; shards are "
            "uncompressed tar files of webdataset samples"
        )
    try:
        old = read_manifest([str(target / "x")]) or {}
    except UserError:  # a damaged one gives way; the classes and templates of a labelled set go with it
        old = {}
    more = {name: old[name] for name in ("classes", "templates") if old.get(name)}
    if target != Path(base):
        more["base"] = base if is_remote(base) else str(Path(base).resolve())
    write_manifest(target, found.entries, **more)
    return found


def _index(location: str, name: str, storage: Storage) -> tuple[dict, dict, bytes]:
    stream = _Pieces(location, storage)
    index = scan(stream, stream.size)
    digest = sha256()
    for start in range(0, stream.size, PIECE):
        digest.update(stream.piece(start))
    entry = {"name": name, "samples": len(index), "bytes": stream.size, "sha256": digest.hexdigest()}
    return entry, index.problems, to_bytes(index)


class _Pieces(io.RawIOBase):
    """A file that is read in pieces of 16 MB, the last two kept: headers are 512 bytes here and there."""

    def __init__(self, location: str, storage: Storage):
        self._location, self._storage = location, storage
        self.size, self._position = storage.size(location), 0
        self._kept: dict[int, bytes] = {}

    def piece(self, start: int) -> bytes:
        if start not in self._kept:
            while len(self._kept) > 1:
                self._kept.pop(next(iter(self._kept)))
            self._kept[start] = self._storage.read(self._location, start, min(PIECE, self.size - start))
        return self._kept[start]

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        parts = []
        while size > 0 and self._position < self.size:
            start = self._position // PIECE * PIECE
            inside = self._position - start
            part = self.piece(start)[inside : inside + size]
            parts.append(part)
            self._position += len(part)
            size -= len(part)
        return b"".join(parts)


def problem_counts(problems: dict[str, dict[str, int]]) -> dict[str, int]:
    """Problems of all shards together."""
    return dict(sum((Counter(p) for p in problems.values()), Counter()))
