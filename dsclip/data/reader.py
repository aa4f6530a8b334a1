"""Samples out of shards: the bytes of one, its members, and what may be used of them. Nothing is ever unpickled."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

from PIL import Image

from dsclip.data.order import Recent
from dsclip.data.shard_cache import local_copy
from dsclip.data.shards import LOCAL, ShardSet, short_name
from dsclip.data.sources import Reader, SourceError, is_remote
from dsclip.data.tar_index import (
    SUFFIX,
    DamagedTar,
    ShardIndex,
    from_bytes,
    members_of,
    scan_file,
)  # fmt: skip

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MEMBER_EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json", "cls", "neg.txt")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MOST_TEXT_BYTES = 1 << 20  # of a .txt, .json, .cls or .neg.txt member
MOST_INDEX_BYTES = 1 << 28
OPEN_INDEXES = 512
GAP = 1 << 16  # two reads of a remote shard with fewer bytes between them become one


class BadSample(Exception):
    """A sample that can't be used; the message is one of few fixed reasons, so that they can be counted."""


@dataclass(frozen=True)
class RawSample:
    """The members of one sample, undecoded. shard and key say where it came from."""

    shard: str
    key: str
    members: dict[str, bytes]

    @property
    def sample_id(self) -> int:
        """A stable int64 of (shard, key)."""
        digest = blake2b(f"{self.shard}/{self.key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)


@dataclass
class SampleReader:
    """Reads single samples of a shard set by their place. most_bytes: of a sample; larger ones are not read."""

    shards: ShardSet
    reader: Reader = LOCAL
    most_bytes: int = 1 << 26
    _indexes: object = field(init=False, repr=False)

    def __post_init__(self):
        self._indexes = Recent(self._open_index, OPEN_INDEXES)

    def read(self, shard: int, position: int) -> RawSample:
        """The sample. Raises BadSample, and SourceError when its shard can't be read at all."""
        location, index = self._indexes(shard)
        start, size = self._range(index, position)
        return self._sample(shard, self.reader.read(location, start, size), size)

    def read_many(self, places: list[tuple[int, int]]) -> list[RawSample | Exception]:
        """The samples of (shard, position) pairs, neighbours in one read; what `read` would raise stands in its place."""
        found: list[RawSample | Exception | None] = [None] * len(places)
        ranges = []
        for number, (shard, position) in enumerate(places):
            try:
                location, index = self._indexes(shard)
                ranges.append((location, *self._range(index, position), number, shard))
            except (BadSample, SourceError) as error:
                found[number] = error
        for run in _runs(sorted(ranges)):
            location, start = run[0][0], run[0][1]
            try:
                content = self.reader.read(location, start, run[-1][1] + run[-1][2] - start)
            except SourceError as error:
                content = error
            for _, first, size, number, shard in run:
                if isinstance(content, SourceError):
                    found[number] = content
                    continue
                try:
                    found[number] = self._sample(shard, content[first - start : first - start + size], size)
                except BadSample as error:
                    found[number] = error
        return found

    def _range(self, index: ShardIndex, position: int) -> tuple[int, int]:
        if position >= len(index):
            raise BadSample("missing sample")  # the manifest promised more than the shard holds
        start, size = int(index.starts[position]), int(index.sizes[position])
        if size > self.most_bytes:
            raise BadSample("sample too large")
        return start, size

    def _sample(self, shard: int, content: bytes, size: int) -> RawSample:
        if len(content) < size:
            raise BadSample("missing sample")
        try:
            key, members = members_of(content, MEMBER_EXTENSIONS)
        except DamagedTar as error:
            raise BadSample("damaged sample") from error
        return RawSample(self.shards.name(shard), key, members)

    def _open_index(self, shard: int) -> tuple[str, ShardIndex]:
        location = self.shards.locations[shard]
        recorded = int(self.shards.shard_bytes[shard])
        index = None
        try:
            sidecar = f"{self.shards.indexes[shard]}/{location.rpartition('/')[2]}{SUFFIX}"
            if is_remote(sidecar) or os.path.isfile(sidecar):
                content = self.reader.read_all(sidecar, MOST_INDEX_BYTES)
                index = from_bytes(content, sidecar, recorded if recorded >= 0 else None)
        except SourceError:
            pass  # a remote shard without a sidecar
        if index is None:
            if is_remote(location):
                location = local_copy(location, self.reader, recorded)
            try:
                index = scan_file(location)
            except OSError as error:
                raise SourceError(f"{location}: {error.strerror}") from error
        return location, index


def _runs(ranges: list[tuple]) -> Iterator[list[tuple]]:
    """Ranges (location, start, size, …) in groups that lie close together."""
    run: list[tuple] = []
    for entry in ranges:
        if run and (entry[0] != run[-1][0] or entry[1] - (run[-1][1] + run[-1][2]) > GAP):
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def read_shard(location: str, bad: dict[str, int]) -> Iterator[RawSample]:
    """The samples of a local shard, in order; what is wrong with the shard is counted in `bad`."""
    index = scan_file(location)
    for reason, count in index.problems.items():
        bad[reason] = bad.get(reason, 0) + count
    for start, size in zip(index.starts.tolist(), index.sizes.tolist(), strict=True):
        try:
            key, members = members_of(LOCAL.read(str(location), start, size), MEMBER_EXTENSIONS)
        except DamagedTar:
            bad["damaged sample"] = bad.get("damaged sample", 0) + 1
            continue
        yield RawSample(short_name(str(location)), key, members)


def image_bytes(raw: RawSample) -> bytes:
    """The sample's image file. Raises BadSample when it has none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in raw.members:
            return raw.members[extension]
    raise BadSample("no image")


def decode_image(raw: RawSample, max_pixels: int) -> Image.Image:
    """The sample's image as RGB. Raises BadSample."""
    content = image_bytes(raw)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are checked right here
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            if image.width * image.height > max_pixels:
                raise BadSample("too many pixels")
            return image.convert("RGB")
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise BadSample("undecodable image") from error


def read_captions(raw: RawSample, caption_key: str) -> list[str]:
    """The sample's captions, from `.json` (string or list under `caption_key`) or `.txt`. Raises BadSample."""
    _refuse_long(raw)
    if "json" in raw.members:
        try:
            found = _parsed(raw.members["json"])[caption_key]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadSample("unreadable caption") from error
        captions = found if isinstance(found, list) else [found]
    elif "txt" in raw.members:
        try:
            captions = [raw.members["txt"].decode("utf-8")]
        except UnicodeDecodeError as error:
            raise BadSample("unreadable caption") from error
    else:
        raise BadSample("no caption")
    captions = [c.strip() for c in captions if isinstance(c, str) and c.strip()]
    if not captions:
        raise BadSample("empty caption")
    return captions


def _refuse_long(raw: RawSample) -> None:
    for extension, content in raw.members.items():
        if extension not in IMAGE_EXTENSIONS and len(content) > MOST_TEXT_BYTES:
            raise BadSample("caption too long")


def read_negatives(raw: RawSample, negative_key: str, most: int | None = None) -> list[str]:
    """The sample's hard-negative captions, the first `most` or all: from `.neg.txt` (one a line) or `.json`. Raises BadSample."""
    if "neg.txt" in raw.members:
        try:
            found = raw.members["neg.txt"].decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise BadSample("unreadable hard negatives") from error
    else:
        found = _json_value(raw, negative_key, [])
    found = found if isinstance(found, list) else [found]
    return [c.strip() for c in found if isinstance(c, str) and c.strip()][:most]


def read_group(raw: RawSample, group_key: str | None, caption: str) -> int:
    """An int64 that is equal for duplicates: of the value under `group_key`, or else of the caption."""
    value = caption.strip().lower() if group_key is None else _json_value(raw, group_key, None)
    if value is None:
        raise BadSample("no group key")
    return int.from_bytes(blake2b(str(value).encode(), digest_size=8).digest(), "big", signed=True)


@lru_cache(maxsize=1)
def _parsed(content: bytes):
    """A .json member, parsed once for its captions, hard negatives and group."""
    return json.loads(content)


def _json_value(raw: RawSample, key: str, otherwise):
    try:
        return _parsed(raw.members["json"]).get(key, otherwise) if "json" in raw.members else otherwise
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadSample("unreadable json") from error


def read_label(raw: RawSample) -> int | None:
    """The class index in `.cls`, or None."""
    content = raw.members.get("cls", b"").strip()
    return int(content) if content.isdigit() else None
