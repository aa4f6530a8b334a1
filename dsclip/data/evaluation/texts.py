"""The text of every sample of a shard, and where its image lies, for sets of many small samples.

The headers of many samples are looked at together, in numpy; whatever is not plain ustar goes the way of training, one
sample at a time, which also says what is wrong with it. Large images are never read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsclip.data.decoding.sample import IMAGE_EXTENSIONS, MEMBER_EXTENSIONS, MOST_TEXT_BYTES, BadSample, RawSample
from dsclip.data.shards.index_file import SUFFIX, read_index
from dsclip.data.shards.shard_set import short_name
from dsclip.data.shards.tar_index import BLOCK, DamagedTar, ShardIndex, locate_members, scan_file
from dsclip.data.sources.storage import SourceError
from dsclip.errors import UserError

TEXT_EXTENSIONS = (*(e for e in MEMBER_EXTENSIONS if e not in IMAGE_EXTENSIONS), "npy")  # several labels a sample
SMALL_SAMPLE = 1 << 16  # bytes: up to here, reading whole samples is faster than going from header to header
GROUP_BYTES = 1 << 23  # of samples that are looked at together: the memory of the group before is taken again
GROUP_SAMPLES = 4096
NAME_BYTES = 100  # of a ustar header, its first
NO_IMAGE = "no image"

Member = tuple[bytes, int, int]  # name, first byte in the shard, size
Place = tuple[str, int, int]  # extension, first byte in the shard, size


class TextSample(NamedTuple):
    """A sample without its image: raw has its text members, and the image is `size` bytes from `start` of the shard."""

    raw: RawSample
    extension: str
    start: int
    size: int


def read_texts(path: str, bad: Counter[str]) -> Iterator[TextSample]:
    """The samples of a local shard, in order; damage and samples without an image are counted in `bad`."""
    index = _index(path)
    bad.update(index.problems)
    name = short_name(path)
    with open(path, "rb", buffering=0) as stream:
        for first, stop in _groups(index):
            starts, ends = index.starts[first:stop], index.starts[first:stop] + index.sizes[first:stop]
            part = _Part(stream.fileno(), int(starts[0]), int(ends[-1]), len(starts))
            levels = _levels(part, starts, ends)
            if alike := _alike(levels, len(starts)):
                yield from _samples_alike(name, alike, part, bad)
                continue
            for start, end, members in zip(starts.tolist(), ends.tolist(), _members(levels, len(starts)), strict=True):
                try:
                    key, places = _named(members) or _one_by_one(part, start, end)
                    yield _sample(name, key, places, part)
                except DamagedTar:
                    bad["damaged sample"] += 1
                except BadSample as reason:
                    bad[str(reason)] += 1


def _index(path: str) -> ShardIndex:
    """From the file beside the shard if it is that of these bytes, or else by walking the shard."""
    try:
        index = read_index(path + SUFFIX, os.path.getsize(path))
    except (SourceError, UserError):
        index = None
    return scan_file(path) if index is None else index


def _groups(index: ShardIndex) -> Iterator[tuple[int, int]]:
    first = 0
    while first < len(index):
        stop = int(np.searchsorted(index.starts, index.starts[first] + GROUP_BYTES))
        stop = max(first + 1, min(stop, first + GROUP_SAMPLES))
        yield first, stop
        first = stop


class _Part:
    """The bytes from `start` to `end` of a file, read at once where the samples in it are small."""

    def __init__(self, descriptor: int, start: int, end: int, samples: int):
        self._descriptor, self._start, self._content = descriptor, start, None
        if end - start <= samples * SMALL_SAMPLE:
            self._content = os.pread(descriptor, end - start, start).ljust(end - start, b"\0")

    def read(self, start: int, length: int) -> bytes:
        if self._content is None:
            return os.pread(self._descriptor, length, start)
        return self._content[start - self._start : start - self._start + length]

    def text(self, start: int, size: int) -> bytes:
        """A text member. A byte more than is allowed is enough for the reader of captions to refuse it."""
        return self.read(start, size if size <= MOST_TEXT_BYTES else MOST_TEXT_BYTES + 1)

    def texts(self, starts: list[int], sizes: list[int]) -> list[bytes]:
        """The same of many."""
        content, first = self._content, self._start
        if content is None or max(sizes, default=0) > MOST_TEXT_BYTES:
            return [self.text(start, size) for start, size in zip(starts, sizes, strict=True)]
        return [content[start - first : start - first + size] for start, size in zip(starts, sizes, strict=True)]

    def headers(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [n, 512] of n positions."""
        if self._content is not None:
            content, rows = self._content, (positions - self._start) // BLOCK
        else:
            content = b"".join(os.pread(self._descriptor, BLOCK, p).ljust(BLOCK, b"\0") for p in positions.tolist())
            rows = np.arange(len(positions))
        blocks: NDArray[np.uint8] = np.frombuffer(content, np.uint8).reshape(-1, BLOCK)
        return blocks[rows]


@dataclass(frozen=True)
class _Level:
    """The first members of all samples, or the second ones, …: of `samples`, which are plain, their names, first bytes and sizes, uint8 [n, 100] and int64 [n]."""

    samples: NDArray[np.int64]
    plain: NDArray[np.bool_]
    names: NDArray[np.uint8]
    bodies: NDArray[np.int64]
    sizes: NDArray[np.int64]


def _levels(part: _Part, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> list[_Level]:
    """The members of samples [n], up to the first of each whose header isn't plain."""
    levels = []
    samples, positions = np.arange(len(starts)), starts
    while len(samples):
        plain, sizes, names = _parse(part.headers(positions))
        bodies = positions + BLOCK
        following = bodies + -(-sizes // BLOCK) * BLOCK
        plain &= following <= ends[samples]
        levels.append(_Level(samples, plain, names, bodies, sizes))
        unfinished = plain & (following < ends[samples])
        samples, positions = samples[unfinished], following[unfinished]
    return levels


def _members(levels: list[_Level], count: int) -> Sequence[Sequence[Member] | None]:
    """The members of each sample; None for a sample with any but plain headers."""
    found = [
        list(zip(_bytes(level.names), level.bodies.tolist(), level.sizes.tolist(), strict=True)) for level in levels
    ]
    if _whole(levels, count):
        return list(zip(*found, strict=True))
    members: list[list[Member] | None] = [[] for _ in range(count)]
    for level, of_level in zip(levels, found, strict=True):
        for sample, is_plain, member in zip(level.samples.tolist(), level.plain.tolist(), of_level, strict=True):
            of_sample = members[sample]
            if is_plain and of_sample is not None:
                of_sample.append(member)
            else:
                members[sample] = None
    return members


def _whole(levels: list[_Level], count: int) -> bool:
    """Whether all samples are plain, and have as many members."""
    return all(len(level.samples) == count and level.plain.all() for level in levels)


class _Alike(NamedTuple):
    """Samples that have members of the same extensions in the same order: keys [n], and of each member its extension, first bytes [n] and sizes [n]."""

    keys: list[str]
    members: list[tuple[str, list[int], list[int]]]


def _alike(levels: list[_Level], count: int) -> _Alike | None:
    """The samples, if all are plain, with members named KEY.EXTENSION, and alike; None if not."""
    if not _whole(levels, count):
        return None
    longest = max(_used(level.names) for level in levels)
    first = np.ascontiguousarray(levels[0].names[:, :longest])
    base = (longest - (first[:, ::-1] == ord("/")).argmax(axis=1)) % longest  # behind the last slash, or 0
    columns = np.arange(longest)
    points = (first == ord(".")) & (columns >= base[:, None])
    point = points.argmax(axis=1)
    in_key = columns <= point[:, None]
    if not points.any(axis=1).all() or (in_key & (first == 0)).any():
        return None
    begins = np.where(in_key, first, 0)
    members = []
    for level in levels:
        written = level.names[0, point[0] + 1 :].tobytes().rstrip(b"\0")
        if not (extension := _extension(written)) or point.max() + len(written) >= longest:
            return None
        expected = begins.copy()
        for place, letter in enumerate(written, start=1):
            expected[np.arange(count), point + place] = letter
        if not np.array_equal(level.names[:, :longest], expected):
            return None
        members.append((extension, level.bodies.tolist(), level.sizes.tolist()))
    return _Alike(
        [name[:end].decode("ascii") for name, end in zip(_bytes(first), point.tolist(), strict=True)], members
    )


def _used(names: NDArray[np.uint8]) -> int:
    """The length of the longest of names [n, 100], at least 1."""
    return int(np.flatnonzero(names.any(axis=0)).max(initial=0)) + 1


def _samples_alike(shard: str, alike: _Alike, part: _Part, bad: Counter[str]) -> Iterator[TextSample]:
    """The same as `_sample` of each; which members count is the same for all."""
    image = _image_of(enumerate(extension for extension, _, _ in alike.members))
    if image is None:
        bad[NO_IMAGE] += len(alike.keys)
        return
    texts: list[dict[str, bytes]] = [{} for _ in alike.keys]
    for extension, starts, sizes in alike.members:
        if extension in TEXT_EXTENSIONS:
            for of_sample, text in zip(texts, part.texts(starts, sizes), strict=True):
                of_sample[extension] = text
    extension, starts, sizes = alike.members[image]
    for key, of_sample, start, size in zip(alike.keys, texts, starts, sizes, strict=True):
        yield TextSample(RawSample(shard, key, of_sample), extension, start, size)


def _image_of(extensions: Iterable[tuple[int, str]]) -> int | None:
    """The number of the member that is the sample's image: the last of one extension counts, and of several the first in their order."""
    found: dict[str, int] = {extension: number for number, extension in extensions if extension in IMAGE_EXTENSIONS}
    return found[min(found, key=IMAGE_EXTENSIONS.index)] if found else None


def _parse(headers: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.uint8]]:
    """(which are plain ustar headers of files with a short ASCII name, sizes, names uint8 [n, 100]) of headers [n, 512]."""
    size_digits, sum_digits = (headers[:, a:b].astype(np.int64) - ord("0") for a, b in ((124, 135), (148, 154)))
    sizes, sums = (digits @ (8 ** np.arange(digits.shape[1])[::-1]) for digits in (size_digits, sum_digits))
    actual = headers.sum(axis=1, dtype=np.int64) - headers[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    plain = (sums == actual) & _is_zero_or(headers[:, 156], "0") & (headers[:, 345] == 0)
    for digits in (size_digits, sum_digits):
        plain &= ((digits >= 0) & (digits < 8)).all(axis=1)
    plain &= (headers[:, 99] == 0) & (headers[:, :100] < 128).all(axis=1) & _is_zero_or(headers[:, 135], " ")
    return plain, np.where(plain, sizes, 0), headers[:, :NAME_BYTES]


def _bytes(names: NDArray[np.uint8]) -> list[bytes]:
    """Names [n, length] without the zeros that fill them up."""
    found: list[bytes] = np.ascontiguousarray(names).view(f"S{names.shape[1]}")[:, 0].tolist()
    return found


def _is_zero_or(values: NDArray[np.uint8], character: str) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (values == 0) | (values == ord(character))
    return found


def _named(members: Sequence[Member] | None) -> tuple[str, list[Place]] | None:
    """(key, places) where every name is KEY.EXTENSION."""
    if not members:
        return None
    first = members[0][0]
    folder, slash, base = first.rpartition(b"/")
    begin = folder + slash + base.partition(b".")[0] + b"."
    if b"\0" in begin:
        return None
    places, start = [], len(begin)
    for name, body, size in members:
        if name[:start] != begin or not (extension := _extension(name[start:])):
            return None
        places.append((extension, body, size))
    return begin[:-1].decode("ascii"), places


@lru_cache(maxsize=1024)
def _extension(name: bytes) -> str:
    """What follows the key's point; "" for what is no extension."""
    return "" if b"/" in name or b"\0" in name else name.decode("ascii").lower()


def _one_by_one(part: _Part, start: int, end: int) -> tuple[str, list[Place]]:
    key, places = locate_members(lambda first, length: part.read(start + first, length), end - start)
    return key, [(extension, start + first, size) for extension, first, size in places]


def _sample(shard: str, key: str, places: list[Place], part: _Part) -> TextSample:
    image = _image_of(enumerate(extension for extension, _, _ in places))
    if image is None:
        raise BadSample(NO_IMAGE)
    texts = {extension: part.text(start, size) for extension, start, size in places if extension in TEXT_EXTENSIONS}
    return TextSample(RawSample(shard, key, texts), *places[image])
