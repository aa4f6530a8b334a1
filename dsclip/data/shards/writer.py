"""Writes samples into numbered tar shards with their indexes and manifest."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import BinaryIO

from webdataset import TarWriter

from dsclip.data.shards.manifest import write_manifest
from dsclip.data.shards.tar_index import SUFFIX, scan, to_bytes

# webdataset's own defaults are the time of writing, a user "bigdata" and files that their owner can't write.
_REPRODUCIBLE = dict(encoder=False, mtime=0, user="", group="", mode=0o644)


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
        self._file: BinaryIO | None = None
        self._tar: TarWriter | None = None
        self._in_shard = 0

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """One sample: members by extension, such as {"jpg": ..., "txt": ...}."""
        if self._tar is None:
            name = f"{len(self._entries):05d}.tar"
            self._file = (self.folder / (name + ".tmp")).open("wb")
            self._tar = TarWriter(self._file, **_REPRODUCIBLE)
            self._entries.append({"name": name})
        self._tar.write({"__key__": key, **members})
        self._in_shard += 1
        if self._in_shard == self._shard_size:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._close()
        entry = self._entries[-1]
        temporary, final = self.folder / (entry["name"] + ".tmp"), self.folder / entry["name"]
        content = temporary.read_bytes()
        entry |= {"samples": self._in_shard, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        index = scan(io.BytesIO(content), len(content))
        final.with_name(final.name + SUFFIX).write_bytes(to_bytes(index))
        os.replace(temporary, final)
        self._in_shard = 0

    def _close(self) -> None:
        if self._tar is not None and self._file is not None:
            self._tar.close()
            self._file.close()
        self._tar = self._file = None

    def __exit__(self, error_type, error, trace) -> None:
        if error_type is not None:
            self._close()
            return
        self._finish_shard()
        write_manifest(self.folder, self._entries, classes=self._classes, templates=self._templates)
