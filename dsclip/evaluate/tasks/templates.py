"""Sentences for zero-shot classification: the sets everyone compares with, and files of one's own."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml

from dsclip.data.layouts.files import text_lines
from dsclip.errors import UserError

SIMPLE = ["a photo of a {}."]
SETS_FILE = Path(__file__).with_name("template_sets.yaml")


@cache
def template_sets() -> dict[str, list[str]]:
    """The sets by name: `openai` (ImageNet's), `cifar`, `simple`, and those of single data sets, such as `food101`."""
    sets: dict[str, list[str]] = yaml.safe_load(SETS_FILE.read_text(encoding="utf-8"))
    return sets


def load_templates(templates: str | list[str] | None) -> list[str] | None:
    """A named set, the lines of a file, or the sentences themselves; `{c}`, as CLIP_benchmark writes, becomes {}.

    Raises UserError when one lacks its {}.
    """
    if templates is None:
        return None
    if isinstance(templates, str):
        templates = template_sets().get(templates) or _lines(templates, "templates")
    sentences = [sentence.replace("{c}", "{}") for sentence in templates]
    for sentence in sentences:
        if "{}" not in sentence:
            raise UserError(f"template {sentence!r} has no {{}} where the class name goes")
    return sentences


def load_classnames(classnames: str | list[str] | None) -> list[str] | None:
    """The lines of a file, or the names themselves."""
    return _lines(classnames, "class names") if isinstance(classnames, str) else classnames


def _lines(path: str, what: str) -> list[str]:
    if not Path(path).is_file():
        sets = f", or one of {', '.join(template_sets())}" if what == "templates" else ""
        raise UserError(f"{what}: {path} is no file; give a file with one a line{sets}")
    lines = text_lines(Path(path).read_bytes(), path)
    if not lines:
        raise UserError(f"{what}: {path} is empty")
    return lines
