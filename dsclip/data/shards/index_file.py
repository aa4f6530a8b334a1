"""The file beside a shard that says where its samples lie: 8 bytes a sample."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from dsclip.data.shards.tar_index import BLOCK, ShardIndex
from dsclip.data.sources.storage import LOCAL, SourceError, Storage, is_remote
from dsclip.errors import UserError

SUFFIX = ".idx"  # 00000.tar has its index in 00000.tar.idx
MOST_INDEX_BYTES = 1 << 28
_MAGIC = b"dsclipx1"
_HEAD = struct.Struct("<8sQQ")  # magic, bytes of the shard, samples


def to_bytes(index: ShardIndex) -> bytes:
    """The file: 24 bytes, then for each sample its first block and its number of blocks, 4 bytes each."""
    if index.shard_bytes >= BLOCK << 32:
        raise UserError(f"a shard of {index.shard_bytes} bytes is too large for an index; keep shards below 2 TB")
    blocks = np.stack([index.starts // BLOCK, index.sizes // BLOCK], axis=1).astype("<u4")
    return _HEAD.pack(_MAGIC, index.shard_bytes, len(index)) + blocks.tobytes()


def from_bytes(content: bytes, name: str, shard_bytes: int | None) -> ShardIndex:
    """Reads the file. Raises UserError when it is damaged or belongs to another version of the shard."""
    if len(content) < _HEAD.size:
        raise UserError(f"the index {name} is damaged; write it again with tools/index_shards.py")
    magic, recorded, samples = _HEAD.unpack_from(content)
    if magic != _MAGIC or len(content) != _HEAD.size + 8 * samples:
        raise UserError(f"the index {name} is damaged; write it again with tools/index_shards.py")
    if shard_bytes is not None and recorded != shard_bytes:
        raise UserError(
            f"the index {name} is of a shard of {recorded:,} bytes, which now has {shard_bytes:,}; write it again with "
            "tools/index_shards.py"
        )
    blocks = np.frombuffer(content, "<u4", offset=_HEAD.size).reshape(-1, 2).astype(np.int64) * BLOCK
    return ShardIndex(blocks[:, 0], blocks[:, 1], recorded, {})


def read_index(path: str, shard_bytes: int | None, storage: Storage = LOCAL) -> ShardIndex | None:
    """The index, or None where no local file is. shard_bytes: of the shard, where that is known.

    Raises SourceError, and UserError as `from_bytes`.
    """
    if is_remote(path):
        content = storage.read_all(path, MOST_INDEX_BYTES)
    else:
        try:
            content = Path(path).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            return None
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror}") from error
    return from_bytes(content, path, shard_bytes)
