"""Raw samples out of shards, and usable samples out of raw ones. Nothing read from a shard is ever unpickled."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from PIL import Image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MEMBER_EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json", "cls")  # `.neg.txt` ends in .txt
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")


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


def read_shard(path: Path, bad: dict[str, int]) -> Iterator[RawSample]:
    """The samples of a tar shard, in order. Counts a damaged shard in `bad` and keeps what precedes the damage."""
    from webdataset.tariterators import base_plus_ext, tar_file_iterator

    shard = f"{path.parent.name}/{path.name}"
    key, members = None, {}
    try:
        with path.open("rb") as stream:
            for file in tar_file_iterator(stream, select_files=_is_member):
                name, extension = base_plus_ext(file["fname"])
                if name != key:
                    if members:
                        yield RawSample(shard, key, members)
                    key, members = name, {}
                members[extension.lower()] = file["data"]
    except Exception:  # tarfile raises many kinds; the sample being read may be half a sample, so it is dropped
        bad["damaged shard"] = bad.get("damaged shard", 0) + 1
        return
    if members:
        yield RawSample(shard, key, members)
    if not _has_end_marker(path):
        bad["damaged shard"] = bad.get("damaged shard", 0) + 1


def _has_end_marker(path: Path) -> bool:
    """Whether a tar ends with its two zero blocks. tarfile takes a cut within a header for the regular end."""
    with path.open("rb") as stream:
        stream.seek(-min(1024, path.stat().st_size), os.SEEK_END)
        return stream.read() == bytes(1024)


def _is_member(name: str) -> bool:
    return name.rpartition(".")[2].lower() in MEMBER_EXTENSIONS


def decode_image(raw: RawSample, max_pixels: int) -> Image.Image:
    """The sample's image as RGB. Raises BadSample."""
    content = next((raw.members[e] for e in IMAGE_EXTENSIONS if e in raw.members), None)
    if content is None:
        raise BadSample("no image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are checked right here
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            if image.width * image.height > max_pixels:
                raise BadSample("too many pixels")
            return image.convert("RGB")
    except BadSample:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise BadSample("undecodable image") from error


def read_captions(raw: RawSample, caption_key: str) -> list[str]:
    """The sample's captions, from `.json` (string or list under `caption_key`) or `.txt`. Raises BadSample."""
    if "json" in raw.members:
        try:
            found = json.loads(raw.members["json"])[caption_key]
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


def _json_value(raw: RawSample, key: str, otherwise):
    try:
        return json.loads(raw.members["json"]).get(key, otherwise) if "json" in raw.members else otherwise
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadSample("unreadable json") from error


def read_label(raw: RawSample) -> int | None:
    """The class index in `.cls`, or None."""
    content = raw.members.get("cls", b"").strip()
    return int(content) if content.isdigit() else None
