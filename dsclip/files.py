"""Files that are whole or absent, and what is in them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def sha256(content: Path | bytes | Iterable[bytes]) -> str:
    """Hex digest of a file, of bytes, or of bytes that come in pieces."""
    digest = hashlib.sha256()
    if isinstance(content, Path):
        buffer = memoryview(bytearray(1 << 20))
        with content.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    else:
        for piece in [content] if isinstance(content, bytes) else content:
            digest.update(piece)
    return digest.hexdigest()


def on_disk(path: Path) -> None:
    """Returns when a file's or folder's content has left the machine's memory for its disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def permit_as_new(path: Path) -> None:
    """Gives a file or folder the permissions of one made here now, which follow the umask.

    What `tempfile` and safetensors' writer make is for its owner alone: others couldn't read it on a cluster.
    """
    new = path.with_name(path.name + ".new")
    new.mkdir() if path.is_dir() else new.touch()
    path.chmod(new.stat().st_mode & 0o7777)
    new.rmdir() if path.is_dir() else new.unlink()


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file aside, on the disk, then renames it: a kill or a power cut leaves the old one or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    on_disk(aside)
    os.replace(aside, path)
