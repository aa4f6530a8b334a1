"""Where each sample lies in a tar shard: found by walking its headers, kept in a sidecar file of 8 bytes a sample.

The samples of a shard are its runs of members with one key. A key that comes back later (interleaved or repeated
members) is no sample of its own: its members would meet others that were read long before.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO
from zlib import adler32

import numpy as np

from dsclip.errors import UserError

BLOCK = 512
SUFFIX = ".idx"  # 00000.tar has its index in 00000.tar.idx
_MAGIC = b"dsclipx1"
_HEAD = struct.Struct("<8sQQ")  # magic, bytes of the shard, samples
MOST_NAME_BYTES = 4096


class DamagedTar(Exception):
    """Bytes that are no tar header, or an archive that ends early."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar. content: offset of its first byte; end: of the block after it."""

    name: str
    content: int
    size: int
    end: int


@dataclass(frozen=True)
class ShardIndex:
    """starts, sizes int64 [samples]: the bytes of each sample's members, headers included. problems: {reason: count}."""

    starts: np.ndarray
    sizes: np.ndarray
    shard_bytes: int
    problems: dict[str, int]

    def damage(self) -> str | None:
        """What is lost of a shard that can't be walked to its end; None for a whole one."""
        if "damaged shard" not in self.problems:
            return None
        end = int(self.starts[-1] + self.sizes[-1]) if len(self) else 0
        return f"only its first {len(self):,} samples are used: it can't be read beyond byte {end:,} of {self.shard_bytes:,}"

    def __len__(self) -> int:
        return len(self.starts)


def walk(stream: BinaryIO, start: int = 0):
    """The regular files of an uncompressed tar from `start`, by its headers alone. Raises DamagedTar."""
    position, long_name = start, None
    while True:
        stream.seek(position)
        header = stream.read(BLOCK)
        if len(header) < BLOCK:
            raise DamagedTar(f"the archive ends at byte {position + len(header)} without its end marker")
        if header == bytes(BLOCK):
            return
        name, size, kind = parse_header(header, position)
        content = position + BLOCK
        position = content + -(-size // BLOCK) * BLOCK
        if kind in b"Lx":
            if size > MOST_NAME_BYTES:
                raise DamagedTar(f"a name of {size} bytes at byte {content}")
            text = stream.read(size)
            long_name = _pax_path(text) if kind == b"x" else text.rstrip(b"\0").decode("utf-8", "replace")
        elif kind in b"0\0":
            yield Member(long_name or name, content, size, position)
            long_name = None
        elif kind != b"g":
            long_name = None  # folders and links; nothing is ever extracted


def parse_header(header: bytes, position: int) -> tuple[str, int, bytes]:
    """(name, size, type) of a 512-byte ustar header. Raises DamagedTar."""
    try:
        checksum = int(header[148:156].split(b"\0")[0].strip() or b"-1", 8)
    except ValueError as error:
        raise DamagedTar(f"no tar header at byte {position}") from error
    if checksum != _sum(header[:148]) + _sum(header[156:]) + 8 * 32:
        raise DamagedTar(f"no tar header at byte {position}")
    field = header[124:136]
    try:
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise DamagedTar(f"a tar header without a size at byte {position}") from error
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:262] == b"ustar" and header[262:263] == b"\0" else b""
    full = prefix + b"/" + name if prefix else name
    return full.decode("utf-8", "replace"), size, header[156:157]


def _sum(header: bytes) -> int:
    """The sum of fewer than 512 bytes. Adler-32's low half is one more, modulo 65521, and ten times as fast as Python's."""
    return (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - 2


def _pax_path(records: bytes) -> str | None:
    """The path of an extended header, whose records read "25 path=a/long/name.jpg\\n"."""
    while records:
        digits, space, _ = records.partition(b" ")
        if not space or not digits.isdigit() or not 0 < int(digits) <= len(records):
            return None
        record, records = records[len(digits) + 1 : int(digits) - 1], records[int(digits) :]
        if record.startswith(b"path="):
            return record[5:].decode("utf-8", "replace")
    return None


def split_name(name: str) -> tuple[str, str]:
    """(key, extension): the extension begins at the first point of the last part, as in webdataset."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def members_of(content: bytes, extensions: tuple[str, ...]) -> tuple[str, dict[str, bytes]]:
    """(key, {extension: bytes}) of the bytes of one sample; members with other extensions are left out.

    Raises DamagedTar where headers are broken or name another sample.
    """
    key, places = locate_members(lambda start, length: content[start : start + length], len(content))
    return key, {name: content[start : start + size] for name, start, size in places if name in extensions}


def locate_members(take: Callable[[int, int], bytes], length: int) -> tuple[str, list[tuple[str, int, int]]]:
    """(key, [(extension, first byte, size)]) of a sample of `length` bytes; take(start, length) gives bytes of it.

    Raises DamagedTar where headers are broken or name another sample.
    """
    key, places, position, long_name = None, [], 0, None
    while position < length:
        name, size, kind = parse_header(take(position, BLOCK).ljust(BLOCK, b"\0"), position)
        body = position + BLOCK
        position = body + -(-size // BLOCK) * BLOCK
        if position > length:
            raise DamagedTar(f"{name} is longer than its sample")
        if kind in b"Lx":
            text = take(body, size)
            long_name = _pax_path(text) if kind == b"x" else text.rstrip(b"\0").decode("utf-8", "replace")
        elif kind in b"0\0":
            stem, extension = split_name(long_name or name)
            long_name = None
            if extension:
                if key not in (None, stem):
                    raise DamagedTar(f"{stem} within the sample {key}")
                key = stem
                places.append((extension, body, size))
    if key is None:
        raise DamagedTar("no member")
    return key, places


def scan(stream: BinaryIO, shard_bytes: int) -> ShardIndex:
    """The index of a shard. What precedes damage stays; the sample at the damage may be half a sample and goes."""
    starts, ends, problems = [], [], {}
    key, start, end, seen = None, 0, 0, set()

    def finish() -> None:
        if key is None:
            return
        if key in seen:
            problems["repeated key"] = problems.get("repeated key", 0) + 1
        else:
            seen.add(key)
            starts.append(start)
            ends.append(end)

    position = 0
    try:
        for member in walk(stream):
            if member.content + member.size > shard_bytes:
                raise DamagedTar(f"the archive ends within {member.name}")
            name, extension = split_name(member.name)
            if extension:
                if name != key:
                    finish()
                    key, start = name, position
                end = member.end
            position = member.end
        finish()
    except DamagedTar:
        problems["damaged shard"] = 1
    sizes = np.array(ends, dtype=np.int64) - np.array(starts, dtype=np.int64)
    return ShardIndex(np.array(starts, dtype=np.int64), sizes, shard_bytes, problems)


def to_bytes(index: ShardIndex) -> bytes:
    """A sidecar file: 24 bytes, then for each sample its first block and its number of blocks, 4 bytes each."""
    if index.shard_bytes >= BLOCK << 32:
        raise UserError(f"a shard of {index.shard_bytes} bytes is too large for an index; keep shards below 2 TB")
    blocks = np.stack([index.starts // BLOCK, index.sizes // BLOCK], axis=1).astype("<u4")
    return _HEAD.pack(_MAGIC, index.shard_bytes, len(index)) + blocks.tobytes()


def from_bytes(content: bytes, name: str, shard_bytes: int | None) -> ShardIndex:
    """Reads a sidecar file. Raises UserError when it is damaged or belongs to another version of the shard."""
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


def scan_file(path: str | os.PathLike) -> ShardIndex:
    """The index of a local shard, without its sidecar."""
    with open(path, "rb", buffering=0) as stream:
        return scan(stream, os.fstat(stream.fileno()).st_size)
