"""Writes samples into numbered tar shards with their indexes and manifest."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from webdataset import TarWriter

from dsclip.data.shards.index_file import SUFFIX, to_bytes
from dsclip.data.shards.manifest import Entry, Labels, write_manifest
from dsclip.data.shards.tar_index import reader_of, scan
from dsclip.files import on_disk, sha256, write_whole

# webdataset's own defaults are the time of writing, a user "bigdata" and files that their owner can't write.
_REPRODUCIBLE = dict(encoder=False, mtime=0, user="", group="", mode=0o644)


class ShardWriter:
    """Writes samples into numbered tar shards of a folder, byte for byte the same for the same samples.

    Use as a context manager: leaving it without an error writes the manifest, which makes the set complete.
    """

    def __init__(
        self,
        folder: Path,
        shard_size: int,
        *,
        classes: list[str] | None = None,
        templates: list[str] | None = None,
        teacher: dict[str, Any] | None = None,
    ):
        self.folder, self._shard_size = Path(folder), shard_size
        self._labels = Labels(classes=classes, templates=templates)
        if teacher is not None:
            self._labels["teacher"] = teacher
        self._entries: list[Entry] = []
        self._file: BinaryIO | None = None
        self._tar: TarWriter | None = None
        self._in_shard = 0
        self._named: str | None = None

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def begin_shard(self, name: str) -> None:
        """The next sample begins a shard of this file name, whose samples are then called as those of another of that name."""
        self._finish_shard()
        self._named = name

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """One sample: members by extension, such as {"jpg": ..., "txt": ...}."""
        if self._tar is None:
            self._file = (self.folder / (self._name + ".tmp")).open("wb")
            self._tar = TarWriter(self._file, **_REPRODUCIBLE)
        self._tar.write({"__key__": key, **members})
        self._in_shard += 1
        if self._in_shard == self._shard_size:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._close()
        name = self._name
        temporary = self.folder / (name + ".tmp")
        content = temporary.read_bytes()
        write_whole(self.folder / (name + SUFFIX), to_bytes(scan(reader_of(content), len(content))))
        on_disk(temporary)
        os.replace(temporary, self.folder / name)
        entry: Entry = {"name": name, "samples": self._in_shard, "bytes": len(content), "sha256": sha256(content)}
        self._entries.append(entry)
        self._in_shard = 0
        self._named = None

    @property
    def _name(self) -> str:
        """The shard that is written."""
        return self._named or f"{len(self._entries):05d}.tar"

    def _close(self) -> None:
        if self._tar is not None and self._file is not None:
            self._tar.close()
            self._file.close()
        self._tar = self._file = None

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error_type is not None:
            self._close()
            return
        self._finish_shard()
        write_manifest(self.folder, self._entries, self._labels)
