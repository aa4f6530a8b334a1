"""Whether shards are those that a manifest lists, and those that a checkpoint was written with."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dsclip.data.shards.shard_set import ShardSet
from dsclip.data.sources.storage import SourceError, Storage, is_remote
from dsclip.errors import UserError
from dsclip.files import sha256

THREADS = 16
MOST_ASKED = 64  # remote shards whose sizes are asked for at start; more of them are compared as they are opened
NAMES = ("data", "data_in_folders", "content")  # of what `identity` says
_TOGETHER = 512  # local files that one thread looks at in a row


def check_sizes(shards: ShardSet, storage: Storage, skip: bool) -> None:
    """Raises UserError for shards whose sizes are not their manifest's; with `skip` they count as problems instead.

    Local shards, and remote ones where they are few. What can't be asked is left to whoever reads it.
    """
    known = [i for i in range(len(shards.locations)) if shards.shard_bytes[i] >= 0]
    local = [i for i in known if not is_remote(shards.locations[i])]
    remote = [i for i in known if is_remote(shards.locations[i])]

    def of_other_size(numbers: list[int]) -> list[tuple[int, int]]:
        sizes = ((i, _size(shards.locations[i], storage)) for i in numbers)
        return [(i, size) for i, size in sizes if size is not None and size != int(shards.shard_bytes[i])]

    tasks = [local[i : i + _TOGETHER] for i in range(0, len(local), _TOGETHER)]
    tasks += [[i] for i in remote] if len(remote) <= MOST_ASKED else []
    with ThreadPoolExecutor(THREADS) as pool:
        wrong = [numbered for part in pool.map(of_other_size, tasks) for numbered in part]
    if not wrong:
        return
    if skip:
        shards.problems["size is not the manifest's"] = len(wrong)
        return
    named = ", ".join(
        f"{shards.name(i)} ({size:,} instead of {int(shards.shard_bytes[i]):,} bytes)" for i, size in wrong[:3]
    )
    raise UserError(
        f"{len(wrong)} shards are not as long as their manifest says: {named}. Copy them again, or write the manifest anew "
        "with tools/index_shards.py; data.on_unreadable=skip reads what is left of them"
    )


def _size(location: str, storage: Storage) -> int | None:
    try:
        return storage.size(location) if is_remote(location) else os.stat(location).st_size
    except (SourceError, OSError):
        return None


def identity(sets: list[ShardSet]) -> dict[str, str | None]:
    """What a checkpoint says of its shards. data: of their files' names and counts, on which the order depends.

    data_in_folders: the same with the last folder's name, which earlier versions wrote as `data`. content: of sizes and
    hashes, None where a manifest doesn't tell.
    """
    numbered = [(s, range(len(s.locations)), s.samples.tolist()) for s in sets]
    content = [(int(s.shard_bytes[i]), s.hashes[i]) for s, numbers, _ in numbered for i in numbers]
    return {
        "data": _digest([([s.identity(i) for i in numbers], counts) for s, numbers, counts in numbered]),
        "data_in_folders": _digest([([s.name(i) for i in numbers], counts) for s, numbers, counts in numbered]),
        "content": _digest(content) if all(size >= 0 and digest for size, digest in content) else None,
    }


def difference(was: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why the shards are others than those of a checkpoint, or None. What only one of both knows is not compared."""
    if was.get("data") not in (now["data"], now["data_in_folders"]):
        return "the shards changed (names of files, or counts of samples)"
    if was.get("content") and now["content"] and was["content"] != now["content"]:
        return "shards of the same names have another content by their manifests"
    return None


def _digest(value: list[Any]) -> str:
    return sha256(repr(value).encode())[:16]
