"""Local copies of remote shards that have no index: fetched once, found again by address and size."""

from __future__ import annotations

import os
import tempfile
from hashlib import sha256
from pathlib import Path

from dsclip.data.sources import Reader, SourceError, redact

PIECE = 1 << 24
MOST_BYTES = int(float(os.environ.get("DSCLIP_SHARD_CACHE_GB", "50")) * 1e9)


def cache_folder() -> Path:
    """Below DSCLIP_CACHE, or ~/.cache/dsclip."""
    return Path(os.environ.get("DSCLIP_CACHE") or Path.home() / ".cache" / "dsclip") / "shards"


def local_copy(location: str, reader: Reader, expected_bytes: int) -> str:
    """The path of a copy of a remote shard. Raises SourceError when it isn't as long as its manifest says.

    The name is a hash of address and size: two sets with equal file names never meet. The oldest copies give way when
    all take more than DSCLIP_SHARD_CACHE_GB (default 50).
    """
    size = reader.size(location)
    if expected_bytes >= 0 and size != expected_bytes:
        raise SourceError(f"{redact(location)} has {size:,} bytes and its manifest says {expected_bytes:,}")
    folder = cache_folder()
    final = folder / f"{sha256(f'{location} {size}'.encode()).hexdigest()}.tar"
    if final.is_file():
        os.utime(final)
        return str(final)
    folder.mkdir(parents=True, exist_ok=True)
    _make_room(folder, size)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            for start in range(0, size, PIECE):
                stream.write(reader.read(location, start, min(PIECE, size - start)))
        os.replace(temporary, final)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return str(final)


def _make_room(folder: Path, needed: int) -> None:
    copies = sorted(folder.glob("*.tar"), key=lambda p: p.stat().st_mtime)
    total = needed + sum(p.stat().st_size for p in copies)
    for path in copies:
        if total <= MOST_BYTES:
            break
        total -= path.stat().st_size
        path.unlink(missing_ok=True)
