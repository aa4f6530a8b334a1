"""The text of every sample of a shard, and where its image lies, for sets of many small samples.

The headers of many samples are looked at together, in numpy; whatever is not plain ustar goes the way of training, one
sample at a time, which also says what is wrong with it. Large images are never read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
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
            for start, end, members in zip(
                starts.tolist(), ends.tolist(), _plain_members(part, starts, ends), strict=True
            ):
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

    def headers(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [n, 512] of n positions."""
        if self._content is not None:
            content, rows = self._content, (positions - self._start) // BLOCK
        else:
            content = b"".join(os.pread(self._descriptor, BLOCK, p).ljust(BLOCK, b"\0") for p in positions.tolist())
            rows = np.arange(len(positions))
        blocks: NDArray[np.uint8] = np.frombuffer(content, np.uint8).reshape(-1, BLOCK)
        return blocks[rows]


def _plain_members(
    part: _Part, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> Sequence[Sequence[Member] | None]:
    """The members of each sample; None for a sample with any but plain headers."""
    # All first members, all second ones, …
    levels: list[tuple[NDArray[np.int64], NDArray[np.bool_], list[Member]]] = []
    samples, positions = np.arange(len(starts)), starts
    while len(samples):
        plain, sizes, names = _parse(part.headers(positions))
        bodies = positions + BLOCK
        following = bodies + -(-sizes // BLOCK) * BLOCK
        plain &= following <= ends[samples]
        levels.append((samples, plain, list(zip(names, bodies.tolist(), sizes.tolist(), strict=True))))
        unfinished = plain & (following < ends[samples])
        samples, positions = samples[unfinished], following[unfinished]
    if all(len(of_level) == len(starts) and plain.all() for of_level, plain, _ in levels):
        return list(zip(*(found for _, _, found in levels), strict=True))
    members: list[list[Member] | None] = [[] for _ in starts]
    for of_level, plain, found in levels:
        for sample, is_plain, member in zip(of_level.tolist(), plain.tolist(), found, strict=True):
            of_sample = members[sample]
            if is_plain and of_sample is not None:
                of_sample.append(member)
            else:
                members[sample] = None
    return members


def _parse(headers: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.int64], list[bytes]]:
    """(which are plain ustar headers of files with a short ASCII name, sizes, names) of headers [n, 512]."""
    size_digits, sum_digits = (headers[:, a:b].astype(np.int64) - ord("0") for a, b in ((124, 135), (148, 154)))
    sizes, sums = (digits @ (8 ** np.arange(digits.shape[1])[::-1]) for digits in (size_digits, sum_digits))
    actual = headers.sum(axis=1, dtype=np.int64) - headers[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    plain = (sums == actual) & _is_zero_or(headers[:, 156], "0") & (headers[:, 345] == 0)
    for digits in (size_digits, sum_digits):
        plain &= ((digits >= 0) & (digits < 8)).all(axis=1)
    plain &= (headers[:, 99] == 0) & (headers[:, :100] < 128).all(axis=1) & _is_zero_or(headers[:, 135], " ")
    names = np.ascontiguousarray(headers[:, :100]).view("S100")[:, 0].tolist()
    return plain, np.where(plain, sizes, 0), names


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
    texts: dict[str, bytes] = {}
    image: Place | None = None
    for place in places:
        extension, start, size = place
        if extension in IMAGE_EXTENSIONS:
            # The last of one extension counts, and of several the first in their order.
            if image is None or IMAGE_EXTENSIONS.index(extension) <= IMAGE_EXTENSIONS.index(image[0]):
                image = place
        elif extension in TEXT_EXTENSIONS:
            # A byte more than is allowed is enough for the reader of captions to refuse the member.
            texts[extension] = part.read(start, size if size <= MOST_TEXT_BYTES else MOST_TEXT_BYTES + 1)
    if image is None:
        raise BadSample("no image")
    return TextSample(RawSample(shard, key, texts), *image)
