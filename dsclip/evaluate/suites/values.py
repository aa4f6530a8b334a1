"""Of what kind the values of a suite's entry must be: checked when the file is read, before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsclip.errors import UserError

WHOLE = ("neighbours", "seeds", "max_samples")
TEXT = ("train", "validation", "solver", "split", "images", "caption_key", "negative_key", "group_key", "unsupported")
LINES = ("classnames", "templates")  # a text, or a list of them


def checked_values(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same, without keys that are null; one number of shots becomes a list, numbers among class names texts. Raises UserError."""
    found = {key: value for key, value in values.items() if value is not None}
    if "shots" in found and not isinstance(found["shots"], list):
        found["shots"] = [found["shots"]]
    if isinstance(found.get("classnames"), list):
        found["classnames"] = [str(name) if _is_number(name) else name for name in found["classnames"]]
    for key, value in found.items():
        if key in WHOLE and not _is_count(value):
            _refuse(key, value, "a whole number, 1 or more", where)
        if key == "shots" and not (value and all(map(_is_count, value))):
            _refuse(key, values[key], "a whole number, 1 or more, or a list of them", where)
        if key in TEXT and not isinstance(value, str):
            _refuse(key, value, "a text", where)
        if key in LINES and not isinstance(value, str) and not _is_list_of_texts(value):
            _refuse(key, value, "a text, or a list of texts", where)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)


def _refuse(key: str, value: object, kind: str, where: str) -> None:
    raise UserError(f"{where}: `{key}` is {value!r}; it must be {kind}")
