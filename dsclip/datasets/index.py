"""Indexes and a manifest for shards that exist already, near or far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from dsclip.data.shards.index_file import SUFFIX, to_bytes
from dsclip.data.shards.manifest import Entry, Labels, read_manifest, write_manifest
from dsclip.data.shards.specification import resolve_shards
from dsclip.data.shards.tar_index import scan
from dsclip.data.sources.storage import SourceError, Storage, is_remote
from dsclip.errors import UserError
from dsclip.files import sha256, write_whole

PIECE = 1 << 24


@dataclass
class Indexed:
    """Entries of the manifest, {shard: {reason: count}}, and shards that couldn't be read at all."""

    entries: list[Entry] = field(default_factory=list)
    problems: dict[str, dict[str, int]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


def index_shards(
    spec: str, out: Path | None, storage: Storage, progress: Callable[[str], None] = lambda text: None
) -> Indexed:
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
    indexed = Indexed()
    for number, location in enumerate(locations):
        name = location.rpartition("/")[2]
        progress(f"{number + 1} of {len(locations)}: {name}")
        try:
            entry, problems, index = _index(location, name, storage)
        except SourceError as error:
            indexed.unreadable[name] = str(error)
            continue
        if entry["samples"]:
            target.mkdir(parents=True, exist_ok=True)
            write_whole(target / (name + SUFFIX), index)
        indexed.entries.append(entry)
        if problems:
            indexed.problems[name] = problems
    if not indexed.entries:
        raise UserError(f"no shard of {spec} could be read ({next(iter(indexed.unreadable.values()))})")
    if not any(entry["samples"] for entry in indexed.entries):
        raise UserError(
            f"no file of {spec} holds a sample: {indexed.entries[0]['name']} is no tar, compressed, or empty; shards are "
            "uncompressed tar files of webdataset samples"
        )
    try:
        before = read_manifest([str(target / "x")])
    except UserError:  # a damaged one gives way; the classes and templates of a labelled set go with it
        before = None
    old: Labels = before or Labels()
    known = {entry["name"] for entry in before["shards"]} if before else set()
    labels: Labels = {}
    # A teacher's features are of the crops that a shard's name stands for: under a new name they are of none.
    if "teacher" in old and {entry["name"] for entry in indexed.entries} <= known:
        labels["teacher"] = old["teacher"]
    if old.get("classes"):
        labels["classes"] = old["classes"]
    if old.get("templates"):
        labels["templates"] = old["templates"]
    if target != Path(base):
        labels["base"] = base if is_remote(base) else str(Path(base).resolve())
    write_manifest(target, indexed.entries, labels)
    return indexed


def _index(location: str, name: str, storage: Storage) -> tuple[Entry, dict[str, int], bytes]:
    pieces = _Pieces(location, storage)
    index = scan(pieces.read, pieces.size)
    digest = sha256(pieces.piece(start) for start in range(0, pieces.size, PIECE))
    entry: Entry = {"name": name, "samples": len(index), "bytes": pieces.size, "sha256": digest}
    return entry, index.problems, to_bytes(index)


class _Pieces:
    """A file that is read in pieces of 16 MB, the last two kept: headers are 512 bytes here and there."""

    def __init__(self, location: str, storage: Storage):
        self._location, self._storage = location, storage
        self.size = storage.size(location)
        self.piece = lru_cache(2)(self._read_piece)

    def _read_piece(self, start: int) -> bytes:
        return self._storage.read(self._location, start, min(PIECE, self.size - start))

    def read(self, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`: fewer only where the file ends."""
        parts = []
        while length > 0 and start < self.size:
            first = start // PIECE * PIECE
            part = self.piece(first)[start - first : start - first + length]
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return b"".join(parts)


def problem_counts(problems: dict[str, dict[str, int]]) -> dict[str, int]:
    """Problems of all shards together."""
    return dict(sum((Counter(p) for p in problems.values()), Counter()))
