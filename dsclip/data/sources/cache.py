"""Local copies of remote shards that have no index: fetched once a machine, found again by address and size."""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsclip.data.sources.storage import SourceError, Storage, redact
from dsclip.errors import UserError
from dsclip.files import sha256

PIECE = 1 << 24
DEFAULT_GB = 50.0
_ABANDONED_S = 86400  # a part that nobody has written to for a day


def dsclip_cache() -> Path:
    """DSCLIP_CACHE, or ~/.cache/dsclip."""
    return Path(os.environ.get("DSCLIP_CACHE") or Path.home() / ".cache" / "dsclip")


def cache_folder() -> Path:
    """Of copies of shards."""
    return dsclip_cache() / "shards"


def most_bytes() -> int:
    """What all copies may take: DSCLIP_SHARD_CACHE_GB. Raises UserError when that is no size."""
    gigabytes = os.environ.get("DSCLIP_SHARD_CACHE_GB")
    try:
        size = DEFAULT_GB if gigabytes is None else float(gigabytes)
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise UserError(
            f"the environment variable DSCLIP_SHARD_CACHE_GB is {gigabytes!r}; give a number of gigabytes, such as 50"
        )
    return int(size * 1e9)


def local_copy(location: str, storage: Storage, expected_bytes: int) -> str:
    """The path of a copy of a remote shard. Raises SourceError when it isn't as long as its manifest says.

    The name is a hash of address and size: two sets with equal file names never meet. The copies used longest ago give
    way when all take more than `most_bytes()`, also while another run uses them: `read_copy` then says so.
    """
    size = storage.size(location)
    if expected_bytes >= 0 and size != expected_bytes:
        raise SourceError(f"{redact(location)} has {size:,} bytes and its manifest says {expected_bytes:,}")
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    digest = sha256(f"{location} {size}".encode())
    final, part = folder / f"{digest}.tar", folder / f"{digest}.part"
    with _alone(folder / f"{digest[:2]}.lock"):
        try:
            os.utime(final)
        except FileNotFoundError:
            _make_room(folder, size)
            with part.open("wb") as stream:
                for start in range(0, size, PIECE):
                    stream.write(storage.read(location, start, min(PIECE, size - start)))
            os.replace(part, final)
    return str(final)


def read_copy(path: str, start: int, length: int) -> bytes:
    """Up to `length` bytes of a copy. Raises FileNotFoundError when it gave way: then fetch it again."""
    with open(path, "rb", buffering=0) as stream:
        return os.pread(stream.fileno(), length, start)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time; the others then find the copy."""
    with path.open("wb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: two may fetch the same
            pass
        yield


def _make_room(folder: Path, needed: int) -> None:
    files = []
    for path in [*folder.glob("*.tar"), *folder.glob("*.part")]:
        try:
            status = path.stat()
        except FileNotFoundError:  # another process removed it
            continue
        if path.suffix == ".tar" or time.time() - status.st_mtime > _ABANDONED_S:
            files.append((status.st_mtime, status.st_size, path))
    total = needed + sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most_bytes():
            break
        total -= size
        path.unlink(missing_ok=True)
