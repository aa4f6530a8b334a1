"""Where each sample lies in a tar shard, by walking its headers.

The samples of a shard are its runs of members with one key. A key that comes back later (interleaved or repeated
members) is no sample of its own: its members would meet others that were read long before.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zlib import adler32

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
MOST_NAME_BYTES = 4096


ReadAt = Callable[[int, int], bytes]  # (start, length) to the bytes there, fewer only where they end


class DamagedTar(Exception):
    """Bytes that are no tar header, or an archive that ends early."""


class Member(NamedTuple):
    """A regular file in a tar. content: offset of its first byte; end: of the block after it."""

    name: str
    content: int
    size: int
    end: int


@dataclass(frozen=True)
class ShardIndex:
    """starts, sizes int64 [samples]: the bytes of each sample's members, headers included. problems: {reason: count}."""

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
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


def walk(read: ReadAt, length: int | None = None) -> Iterator[Member]:
    """The regular files of an uncompressed tar, by its headers alone. Raises DamagedTar.

    length: of a part that holds whole members and no end marker, such as a sample; an archive ends by its marker.
    """
    position = 0
    long_name: str | None = None
    while length is None or position < length:
        header = read(position, BLOCK)
        if len(header) < BLOCK:
            raise DamagedTar(f"the archive ends at byte {position + len(header)} without its end marker")
        if length is None and header == bytes(BLOCK):
            return
        name, size, kind = parse_header(header, position)
        content = position + BLOCK
        position = content + -(-size // BLOCK) * BLOCK
        if length is not None and position > length:
            raise DamagedTar(f"{name} is longer than its sample")
        if kind in b"Lx":
            if size > MOST_NAME_BYTES:
                raise DamagedTar(f"a name of {size} bytes at byte {content}")
            text = read(content, size)
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
    key, places = locate_members(reader_of(content), len(content))
    return key, {name: content[start : start + size] for name, start, size in places if name in extensions}


def reader_of(content: bytes) -> ReadAt:
    """Reads parts of bytes that are in memory."""
    return lambda start, length: content[start : start + length]


def locate_members(read: ReadAt, length: int) -> tuple[str, list[tuple[str, int, int]]]:
    """(key, [(extension, first byte, size)]) of a sample of `length` bytes.

    Raises DamagedTar where headers are broken or name another sample.
    """
    key: str | None = None
    places = []
    for member in walk(read, length):
        stem, extension = split_name(member.name)
        if not extension:
            continue
        if key not in (None, stem):
            raise DamagedTar(f"{stem} within the sample {key}")
        key = stem
        places.append((extension, member.content, member.size))
    if key is None:
        raise DamagedTar("no member")
    return key, places


def scan(read: ReadAt, shard_bytes: int) -> ShardIndex:
    """The index of a shard. What precedes damage stays; the sample at the damage may be half a sample and goes."""
    starts: list[int] = []
    ends: list[int] = []
    seen: set[str] = set()
    problems: Counter[str] = Counter()
    key: str | None = None
    start = end = position = 0

    def finish() -> None:
        if key is None:
            return
        if key in seen:
            problems["repeated key"] += 1
        else:
            seen.add(key)
            starts.append(start)
            ends.append(end)

    try:
        for member in walk(read):
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
    first = np.array(starts, dtype=np.int64)
    return ShardIndex(first, np.array(ends, dtype=np.int64) - first, shard_bytes, dict(problems))


def scan_file(path: str | Path) -> ShardIndex:
    """The index of a local shard, without its sidecar. Raises OSError."""
    with open(path, "rb", buffering=0) as stream:
        descriptor = stream.fileno()
        return scan(lambda start, length: os.pread(descriptor, length, start), os.fstat(descriptor).st_size)
