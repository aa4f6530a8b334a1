"""docs/reference.md: every key of a recipe, from the fields of the sections. The command line of tools/make_reference.py."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsclip.command_line import parser, run_tool
from dsclip.config.describe import Allowed, allowed, element_type
from dsclip.config.old_names import OLD_NAMES
from dsclip.config.schema import Recipe

EXAMPLE = "python tools/make_reference.py"
PAGE = Path("docs/reference.md")
HEAD = """# Every key of a recipe

Written by `python tools/make_reference.py` from the fields in [`dsclip/config/`](../dsclip/config/schema.py); change them there. A recipe
is a YAML file of the sections below; what it leaves out keeps its default, and `section.key=value` on the command line overrides both.
An unknown key or section is an error that says which one was probably meant. How a run is trained, a guide to the keys that matter:
[training](training.md); ZeRO, bf16, clipping and offload are the DeepSpeed JSON's.
"""


def main(argv: list[str] | None = None) -> None:
    """tools/make_reference.py."""
    p = parser("Writes the reference of all keys of a recipe from the fields of its sections.", EXAMPLE)
    p.add_argument("page", nargs="?", type=Path, default=PAGE, help=f"where to (default: {PAGE})")
    sys.exit(run_tool(make_reference, p.parse_args(argv)))


def make_reference(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """{"page", "keys"}: how many keys the page has."""
    arguments.page.write_text(reference(), encoding="utf-8")
    keys = sum(len(dataclasses.fields(section)) for section in _sections().values())
    return {"page": str(arguments.page), "keys": keys}, f"{keys} keys in {arguments.page}"


def reference() -> str:
    """The page."""
    parts = [HEAD]
    for name, section in _sections().items():
        rows = "\n".join(_rows(name, section))
        doc = str(section.__doc__).strip()
        parts.append(
            f"## {name}\n\n{doc}\n\n| key | type | default | values | meaning |\n|---|---|---|---|---|\n{rows}\n"
        )
    old = [f"`{s}.{old}` is `{s}.{new}` today" for s, names in OLD_NAMES.items() for old, new in names.items()]
    parts.append(f"## Old names\n\nStill read, with a warning: {', '.join(old)}.\n")
    return "\n".join(parts)


def _sections() -> dict[str, Any]:
    return typing.get_type_hints(Recipe)


def _hints(section: Any) -> dict[str, Any]:
    return typing.get_type_hints(section, include_extras=True)


def _rows(name: str, section: Any) -> Iterator[str]:
    """A section's keys, and after a list of elements that have keys of their own those."""
    for key, hint in _hints(section).items():
        what, described = allowed(hint), section.__pydantic_fields__[key]
        value = described.get_default(call_default_factory=True)
        default = "" if described.is_required() else f"`{json.dumps(value, ensure_ascii=False)}`"
        cells = (f"`{name}.{key}`", what.type_words, default, _values(what), described.description)
        yield f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in cells)} |"
        if element := element_type(hint):
            yield from _rows(f"{name}.{key}[]", element)


def _values(what: Allowed) -> str:
    return ", ".join(f"`{choice}`" for choice in what.choices) or what.bounds or what.rule
