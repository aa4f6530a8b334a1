"""Shards that are open: where their samples lie, and how their bytes are read. Safe for several threads."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass

from dsclip.data.shards.index_file import SUFFIX, read_index
from dsclip.data.shards.shard_set import ShardSet
from dsclip.data.shards.tar_index import ShardIndex, scan_file
from dsclip.data.sources.cache import local_copy, most_bytes, read_copy
from dsclip.data.sources.storage import MissingSource, SourceError, Storage, is_remote
from dsclip.errors import UserError

MOST_ENTRIES = 8_000_000  # samples whose places are kept, 16 bytes each


@dataclass
class OpenShard:
    """A shard and its index. copy: where a remote one was copied to, for want of an index."""

    location: str
    index: ShardIndex
    storage: Storage
    copy: str | None = None

    def read(self, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`. Raises SourceError."""
        if self.copy is None:
            return self.storage.read(self.location, start, length)
        try:
            return read_copy(self.copy, start, length)
        except FileNotFoundError:  # it gave way to another run's copies
            self.copy = local_copy(self.location, self.storage, self.index.shard_bytes)
            return read_copy(self.copy, start, length)


class OpenShards:
    """The open shards of a set, by number; those opened longest ago are closed first."""

    def __init__(self, shards: ShardSet, storage: Storage):
        self._shards, self._storage = shards, storage
        self._lock, self._entries = threading.Lock(), 0
        self._open: dict[
            int, Future[OpenShard]
        ] = {}  # no lru_cache: what counts is the samples of all, not their number

    def __reduce__(self) -> tuple[type[OpenShards], tuple[ShardSet, Storage]]:
        # Loader workers may be spawned; they open shards themselves.
        return OpenShards, (self._shards, self._storage)

    def __call__(self, shard: int) -> OpenShard:
        """The shard, opened by one thread while others that want it wait. Raises SourceError, and UserError."""
        with self._lock:
            opening = self._open.get(shard)
            first = opening is None
            if opening is None:
                opening = self._open[shard] = Future()
        if first:
            try:
                opened = open_shard(self._shards, shard, self._storage)
            except BaseException as error:
                with self._lock:
                    del self._open[shard]
                opening.set_exception(error)
            else:
                opening.set_result(opened)
                self._account(shard, len(opened.index))
        return opening.result()

    def _account(self, shard: int, entries: int) -> None:
        with self._lock:
            self._entries += entries
            for old in list(self._open):
                if self._entries <= MOST_ENTRIES or old == shard:
                    break
                if self._open[old].done():
                    self._entries -= len(self._open.pop(old).result().index)


def open_shard(shards: ShardSet, shard: int, storage: Storage) -> OpenShard:
    """With the index beside the manifest, or else by walking the headers of the shard or of a copy of it."""
    location, recorded = shards.locations[shard], int(shards.shard_bytes[shard])
    try:
        index = read_index(sidecar(shards, shard), recorded if recorded >= 0 else None, storage)
    except SourceError:
        index = None
    copy = None
    if index is None:
        copy = local_copy(location, storage, recorded) if is_remote(location) else None
        try:
            index = scan_file(copy or location)
        except OSError as error:
            raise SourceError(f"{location}: {error.strerror}") from error
    return OpenShard(location, index, storage, copy)


def sidecar(shards: ShardSet, shard: int) -> str:
    """Where the shard's index would be."""
    return f"{shards.indexes[shard]}/{shards.locations[shard].rpartition('/')[2]}{SUFFIX}"


def check_copies_fit(shards: ShardSet, storage: Storage) -> None:
    """Raises UserError for remote shards without indexes of which the cache holds only a part: each would be copied again and again."""
    remote = [i for i, location in enumerate(shards.locations) if is_remote(location) and shards.samples[i]]
    needed = sum(max(0, int(shards.shard_bytes[i])) for i in remote)
    if not remote or needed <= most_bytes():
        return
    try:
        if read_index(sidecar(shards, remote[0]), None, storage) is not None:
            return
    except MissingSource:
        pass
    except SourceError:  # said when it is read for good
        return
    folder = shards.locations[remote[0]].rpartition("/")[0]
    raise UserError(
        f"the shards in {folder} have no indexes, so they would be copied whole: {needed / 1e9:,.1f} GB, and "
        f"DSCLIP_SHARD_CACHE_GB allows {most_bytes() / 1e9:,.1f} GB. Write indexes with tools/index_shards.py {folder} OUT and "
        "train on OUT, or raise DSCLIP_SHARD_CACHE_GB"
    )
