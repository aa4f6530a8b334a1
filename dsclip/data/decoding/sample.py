"""One sample, undecoded: its members, and what may be used of them. Nothing is ever unpickled."""

from __future__ import annotations

import io
import json
import re
import warnings
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsclip.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEACHER = "teacher.npy"  # a teacher's features, see `read_teacher`
MEMBER_EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json", "cls", "neg.txt", TEACHER)
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
IN_VECTOR = r"npy:(\d+)"  # a part's key that is a place in the sample's .npy
_DECODE_JSON = json.JSONDecoder().raw_decode  # without the looks for blanks before and behind
MOST_TEXT_BYTES = 1 << 20  # of a .txt, .json, .cls or .neg.txt member


class BadSample(Exception):
    """A sample that can't be used; the message is one of few fixed reasons, so that they can be counted."""


class RawSample(NamedTuple):
    """The members of one sample, undecoded. shard (see `ShardSet.identity`) and key say which it is."""

    shard: str
    key: str
    members: dict[str, bytes]

    @property
    def sample_id(self) -> int:
        """A stable int64 of (shard, key)."""
        digest = blake2b(f"{self.shard}/{self.key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)


def image_bytes(raw: RawSample) -> bytes:
    """The sample's image file. Raises BadSample when it has none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in raw.members:
            return raw.members[extension]
    raise BadSample("no image")


def decode_image(raw: RawSample, max_pixels: int) -> Image.Image:
    """The sample's image as RGB, on white where it is transparent. Raises BadSample."""
    content = image_bytes(raw)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are checked right here
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            if image.width * image.height > max_pixels:
                raise BadSample("too many pixels")
            return on_white(image)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise BadSample("undecodable image") from error


def on_white(image: Image.Image) -> Image.Image:
    """The image as RGB. What shows through is white, as in transformers' processors; plain conversion would show hidden colours."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    background = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")


def read_captions(raw: RawSample, caption_key: str) -> list[str]:
    """The sample's captions, from `.json` (string or list under `caption_key`) or `.txt`. Raises BadSample."""
    _refuse_long(raw)
    if "json" in raw.members:
        try:
            value = _parsed(raw.members["json"])[caption_key]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadSample("unreadable caption") from error
        captions = value if isinstance(value, list) else [value]
    elif "txt" in raw.members:
        try:
            captions = [raw.members["txt"].decode("utf-8")]
        except UnicodeDecodeError as error:
            raise BadSample("unreadable caption") from error
    else:
        raise BadSample("no caption")
    captions = [text for c in captions if isinstance(c, str) and (text := c.strip())]
    if not captions:
        raise BadSample("empty caption")
    return captions


def _refuse_long(raw: RawSample) -> None:
    for extension, content in raw.members.items():
        if len(content) > MOST_TEXT_BYTES and extension not in IMAGE_EXTENSIONS:
            raise BadSample("caption too long")


def read_negatives(raw: RawSample, negative_key: str, most: int | None = None) -> list[str]:
    """The sample's hard-negative captions, the first `most` or all: from `.neg.txt` (one a line) or `.json`. Raises BadSample."""
    if "neg.txt" in raw.members:
        try:
            lines = raw.members["neg.txt"].decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise BadSample("unreadable hard negatives") from error
    else:
        value = _json_value(raw, negative_key, None)
        if value is None:
            return []
        lines = value if isinstance(value, list) else [value]
    return [text for c in lines if isinstance(c, str) and (text := c.strip())][:most]


def read_group(raw: RawSample, group_key: str | None, caption: str) -> int:
    """An int64 that is equal for duplicates: of the value under `group_key`, or else of the caption."""
    value = caption.strip().lower() if group_key is None else _json_value(raw, group_key, None)
    if value is None:
        raise BadSample("no group key")
    return int.from_bytes(blake2b(str(value).encode(), digest_size=8).digest(), "big", signed=True)


def read_part(raw: RawSample, part_key: str | None) -> str | None:
    """The part of its set that a sample is of, None where there is none: the word or number under `part_key` of its .json, or for `npy:I` the
    I-th number, from 0, of the vector in its .npy, where DataComp's shards have metadata. Raises BadSample."""
    if part_key is None:
        return None
    if place := re.fullmatch(IN_VECTOR, part_key):
        numbers, index = _vector(raw) if "npy" in raw.members else np.empty(0), int(place[1])
        return _number_word(numbers[index]) if index < len(numbers) else None
    value = _json_value(raw, part_key, None)
    return str(value) if isinstance(value, str | int) else None


def check_part_key(part_key: str | None) -> None:
    """Raises UserError for one that begins as a place in the .npy does and is none."""
    if part_key is not None and part_key.startswith("npy:") and not re.fullmatch(IN_VECTOR, part_key):
        raise UserError(
            f"the group key {part_key!r} is no place in .npy; give npy: and a number from 0 on, such as npy:0"
        )


def _number_word(number: Any) -> str | None:
    """A number of a vector, all its digits: 1234567.0 is "1234567"; None for one that isn't finite."""
    if not np.isfinite(number):
        return None
    return str(int(number)) if number == int(number) else str(number)


_last_json: tuple[bytes | None, Any] = None, None  # one assignment, so that threads see a whole pair


def _parsed(content: bytes) -> Any:
    """A .json member, parsed once for its captions, hard negatives and group."""
    global _last_json
    last, value = _last_json
    if last is not content:
        value = _decoded_json(content)
        _last_json = content, value
    return value


def _decoded_json(content: bytes) -> Any:
    try:  # json.loads first looks which encoding bytes have, for as long as it parses them
        text = content.decode()
        value, end = _DECODE_JSON(text)
        return value if end == len(text) else json.loads(text)
    except ValueError:  # another encoding, or blanks before it
        return json.loads(content)


def read_label_set(raw: RawSample) -> tuple[int, ...] | None:
    """The classes of a sample that may have several: where its `.npy` isn't zero, or `labels` in its `.json`; None where there is neither.

    Raises BadSample.
    """
    if "npy" in raw.members:
        return tuple(np.flatnonzero(_vector(raw)).tolist())
    labels = _json_value(raw, "labels", None)
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(type(label) is int and label >= 0 for label in labels):
        raise BadSample("unreadable labels")
    return tuple(sorted(set(labels)))


def read_teacher(raw: RawSample, pass_: int) -> NDArray[np.float32]:
    """The features of image and caption [2, D] that a teacher had of them in a pass over the data, of [passes, 2, D]. Raises BadSample."""
    try:
        stored = np.load(io.BytesIO(raw.members[TEACHER]), allow_pickle=False)
    except KeyError as error:
        raise BadSample("no features of a teacher") from error
    except (ValueError, OSError, EOFError) as error:
        raise BadSample("unreadable features of a teacher") from error
    if stored.ndim != 3 or stored.shape[1] != 2 or pass_ >= len(stored) or stored.dtype.kind != "f":
        raise BadSample("unreadable features of a teacher")
    return np.asarray(stored[pass_], dtype=np.float32)


def _vector(raw: RawSample) -> NDArray[Any]:
    """Of its .npy. Raises BadSample."""
    try:
        numbers: NDArray[Any] = np.load(io.BytesIO(raw.members["npy"]), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BadSample("unreadable .npy") from error
    if numbers.ndim != 1 or numbers.dtype.kind not in "biuf":
        raise BadSample("unreadable .npy")
    return numbers


def _json_value(raw: RawSample, key: str, otherwise: Any) -> Any:
    try:
        return _parsed(raw.members["json"]).get(key, otherwise) if "json" in raw.members else otherwise
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadSample("unreadable json") from error


def read_class(raw: RawSample, classes: int) -> int:
    """The class index in `.cls`, of so many classes. Raises BadSample."""
    label = read_label(raw)
    if label is None:
        raise BadSample("no class")
    if label >= classes:
        raise BadSample("class beyond those of the classifier")
    return label


def read_label(raw: RawSample) -> int | None:
    """The class index in `.cls`, or None."""
    content = raw.members.get("cls", b"").strip()
    return int(content) if content.isdigit() else None
