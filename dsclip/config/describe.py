"""What a key of a recipe takes, in words: for messages about wrong values and for docs/reference.md."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from dsclip.config.kinds import Rule


@dataclass(frozen=True)
class Allowed:
    """What a key takes. types: as they are said; choices: of a word; bounds and rule: in words, or empty."""

    types: tuple[str, ...]
    choices: tuple[str, ...]
    bounds: str
    rule: str

    @property
    def type_words(self) -> str:
        """Such as `int or null`."""
        return " or ".join(self.types)


def allowed(hint: Any) -> Allowed:
    """What an annotation of a section's field allows."""
    names: list[str] = []
    choices: tuple[str, ...] = ()
    limits: dict[str, float] = {}
    rule = ""
    for option, metadata in _options(hint):
        names.append(_name(option))
        if typing.get_origin(option) is Literal:
            choices = typing.get_args(option)
        for item in metadata:
            if isinstance(item, Rule):
                rule = item.wanted
            for bound in ("gt", "ge", "lt", "le"):
                if (limit := getattr(item, bound, None)) is not None:
                    limits[bound] = limit
    return Allowed(tuple(names), choices, _bounds(limits), rule)


def element_type(hint: Any) -> Any:
    """The dataclass whose keys each element of a list has; None for anything but such a list."""
    elements = typing.get_args(hint) if typing.get_origin(hint) is list else ()
    return next((x for x in elements if dataclasses.is_dataclass(x)), None)


def _options(hint: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[Any, list[Any]]]:
    """The members of a union, each with what its annotation says beside the type."""
    if typing.get_origin(hint) is Annotated:
        inner, *own = typing.get_args(hint)
        yield from _options(inner, (*metadata, *own))
    elif isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        for option in typing.get_args(hint):
            yield from _options(option, metadata)
    else:
        flat = [m for x in metadata for m in (x.metadata if isinstance(x, FieldInfo) else (x,))]
        yield hint, flat


def _name(option: Any) -> str:
    if option is type(None):
        return "null"
    if typing.get_origin(option) is Literal:
        return "str"
    if typing.get_origin(option) is list and typing.get_origin(inner := typing.get_args(option)[0]) is Annotated:
        return f"list[{' or '.join(allowed(inner).types)}]"
    if element := element_type(option):
        return f"list[{{{', '.join(f.name for f in dataclasses.fields(element))}}}]"
    return option.__name__ if isinstance(option, type) and not typing.get_args(option) else str(option)


def _bounds(limits: dict[str, float]) -> str:
    """gt, ge, lt and le in words; "" for none."""
    said = {key: _number(limit) for key, limit in limits.items()}
    match sorted(said):
        case ["ge", "le"]:
            return f"between {said['ge']} and {said['le']}"
        case ["ge", "lt"]:
            return f"in [{said['ge']}, {said['lt']})"
    words = {"gt": "greater than {}", "ge": "{} or more", "lt": "less than {}", "le": "at most {}"}
    return " and ".join(words[key].format(said[key]) for key in words if key in said)


def _number(limit: float) -> str:
    if isinstance(limit, int) and limit > 1 << 32 and limit & (limit + 1) == 0:
        return f"2^{limit.bit_length()} - 1"
    return f"{limit:g}" if isinstance(limit, float) else str(limit)
