"""Where an evaluation image lies, and what tells that its file changed."""

from __future__ import annotations

import os
from typing import NamedTuple

from dsclip.data.layouts.files import file_state
from dsclip.data.layouts.rows import Box
from dsclip.data.sources.storage import is_remote


class ImagePlace(NamedTuple):
    """Where an image lies: `size` bytes from `start` of a shard, or a file of its own, whose size is −1."""

    location: str
    extension: str
    start: int
    size: int
    box: Box | None = None  # what of it is shown


def shard_state(path: str) -> tuple[str, int, int]:
    """(place, size, time of change) of a file; of a remote one its address alone."""
    if is_remote(path):
        return path, 0, 0
    return file_state(path)


def read_part_of(path: str, place: ImagePlace) -> bytes:
    """Its bytes in the file of a shard. Raises OSError."""
    # A file of its own for each read: descriptors that are shared by threads may be closed by another.
    with open(path, "rb", buffering=0) as stream:
        return os.pread(stream.fileno(), place.size, place.start)
