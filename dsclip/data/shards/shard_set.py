"""Shards with what their manifests say: the set that an order is made of."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dsclip.data.shards.manifest import MANIFEST, Listed, folder_of, listed_shards
from dsclip.data.shards.specification import DEMO, parts_of, resolve_shards
from dsclip.data.shards.tar_index import ShardIndex, scan_file
from dsclip.data.sources.storage import LOCAL, Storage, is_remote
from dsclip.errors import UserError


@dataclass(frozen=True)
class ShardSet:
    """Shards with what their manifests say. samples, shard_bytes int64 [S]; shard_bytes is −1 where no manifest tells."""

    locations: list[str]
    samples: NDArray[np.int64]
    shard_bytes: NDArray[np.int64]
    problems: dict[str, int]  # of shards without a manifest, found while their samples were counted
    damage: dict[int, str]  # of these shards: what is lost
    indexes: list[str]  # the folder of each shard's manifest, where its index lies too, or its own
    hashes: list[str | None]  # SHA-256 by the manifest
    repeats: dict[int, int] = field(default_factory=dict)  # see `told_apart`

    def name(self, shard: int) -> str:
        """What messages call it: its folder and file."""
        return short_name(self.locations[shard])

    @property
    def twice(self) -> str | None:
        """A file name that several of the shards have: their `identity` is another in a set of their own; None without one."""
        return next((self.locations[shard].rpartition("/")[2] for shard in self.repeats), None)

    def identity(self, shard: int) -> str:
        """What the randomness of its samples depends on, wherever the set lies: its file's name.

        The word before it is the demo's folder, which was part of the name once: so the demo's numbers are what they were.
        """
        return f"train{self.repeats.get(shard, '')}/{self.locations[shard].rpartition('/')[2]}"


def told_apart(sets: list[ShardSet]) -> list[ShardSet]:
    """The sets with their `repeats`: which shards have a file name that others before them have, and how many."""
    seen: Counter[str] = Counter()
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


def open_shards(spec: str | list[str], storage: Storage = LOCAL) -> ShardSet:
    """The shards with their numbers of samples: from the manifests beside them, else counted by walking local shards.

    Raises UserError when remote shards have no manifest, or when there is no sample at all.
    """
    locations = resolve_shards(spec, storage)
    known: dict[str, Listed] = {}
    # A manifest that is named, or lies in a named folder, may list shards that lie elsewhere; others list their neighbours.
    named = [p.rstrip("/") or "/" for p in parts_of(spec) if p not in DEMO]
    for path in [p if p.endswith(".json") else f"{p}/{MANIFEST}" for p in named if _is_index(p)]:
        listed = listed_shards(path, storage)
        if missing := sorted(listed.keys() - set(locations)):
            raise UserError(
                f"{path} lists {len(missing)} shards that are not there: {', '.join(missing[:3])}. Copy them again, or write the "
                "manifest anew with tools/index_shards.py"
            )
        known |= listed
    for folder in {folder_of(x) for x in locations if x not in known}:
        known |= listed_shards(f"{folder}/{MANIFEST}", storage)
    samples, sizes, indexes = [], [], []
    hashes: list[str | None] = []
    problems: Counter[str] = Counter()
    damage: dict[int, str] = {}
    for number, location in enumerate(locations):
        known_shard = known.get(location)
        if known_shard is not None:
            entry, folder = known_shard
            samples.append(entry["samples"])
            sizes.append(entry["bytes"])
            hashes.append(entry.get("sha256"))
        else:
            folder = folder_of(location)
            index = _walked(location)
            samples.append(len(index))
            sizes.append(-1)
            hashes.append(None)
            problems.update(index.problems)
            if lost := index.damage():
                damage[number] = lost
        indexes.append(folder)
    counts, shard_bytes = np.array(samples, dtype=np.int64), np.array(sizes, dtype=np.int64)
    return told_apart([ShardSet(locations, counts, shard_bytes, problems, damage, indexes, hashes)])[0]


def _walked(location: str) -> ShardIndex:
    """The index of a shard that no manifest lists. Raises UserError."""
    if is_remote(location):
        raise UserError(
            f"{location} has no manifest beside it that lists it; make one with "
            f"tools/index_shards.py {folder_of(location)} OUT and train on OUT"
        )
    try:
        return scan_file(location)
    except OSError as error:
        raise UserError(f"shard {location} can't be read: {error.strerror}") from error


def named_shards(spec: str | list[str], storage: Storage = LOCAL) -> ShardSet:
    """The shards by their names alone: nothing of them is opened, counted or looked for in a manifest."""
    locations = resolve_shards(spec, storage)
    unknown = len(locations)
    counts, sizes = np.zeros(unknown, dtype=np.int64), np.full(unknown, -1, dtype=np.int64)
    return told_apart(
        [ShardSet(locations, counts, sizes, {}, {}, [folder_of(x) for x in locations], [None] * unknown)]
    )[0]


def _is_index(part: str) -> bool:
    return part.endswith(".json") or os.path.isdir(part)
