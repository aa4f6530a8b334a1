"""Sentences for zero-shot classification: the sets everyone compares with, and files of one's own."""

from __future__ import annotations

from pathlib import Path

from dsclip.errors import UserError

SIMPLE = ["a photo of a {}."]

# Radford et al. 2021, released prompts for CIFAR-10.
CIFAR = [
    "a photo of a {}.", "a blurry photo of a {}.", "a black and white photo of a {}.", "a low contrast photo of a {}.",
    "a high contrast photo of a {}.", "a bad photo of a {}.", "a good photo of a {}.", "a photo of a small {}.",
    "a photo of a big {}.", "a photo of the {}.", "a blurry photo of the {}.", "a black and white photo of the {}.",
    "a low contrast photo of the {}.", "a high contrast photo of the {}.", "a bad photo of the {}.",
    "a good photo of the {}.", "a photo of the small {}.", "a photo of the big {}.",
]  # fmt: skip

# Radford et al. 2021, the 80 released prompts for ImageNet.
OPENAI = [
    "a bad photo of a {}.", "a photo of many {}.", "a sculpture of a {}.", "a photo of the hard to see {}.",
    "a low resolution photo of the {}.", "a rendering of a {}.", "graffiti of a {}.", "a bad photo of the {}.",
    "a cropped photo of the {}.", "a tattoo of a {}.", "the embroidered {}.", "a photo of a hard to see {}.",
    "a bright photo of a {}.", "a photo of a clean {}.", "a photo of a dirty {}.", "a dark photo of the {}.",
    "a drawing of a {}.", "a photo of my {}.", "the plastic {}.", "a photo of the cool {}.",
    "a close-up photo of a {}.", "a black and white photo of the {}.", "a painting of the {}.", "a painting of a {}.",
    "a pixelated photo of the {}.", "a sculpture of the {}.", "a bright photo of the {}.", "a cropped photo of a {}.",
    "a plastic {}.", "a photo of the dirty {}.", "a jpeg corrupted photo of a {}.", "a blurry photo of the {}.",
    "a photo of the {}.", "a good photo of the {}.", "a rendering of the {}.", "a {} in a video game.",
    "a photo of one {}.", "a doodle of a {}.", "a close-up photo of the {}.", "a photo of a {}.",
    "the origami {}.", "the {} in a video game.", "a sketch of a {}.", "a doodle of the {}.",
    "a origami {}.", "a low resolution photo of a {}.", "the toy {}.", "a rendition of the {}.",
    "a photo of the clean {}.", "a photo of a large {}.", "a rendition of a {}.", "a photo of a nice {}.",
    "a photo of a weird {}.", "a blurry photo of a {}.", "a cartoon {}.", "art of a {}.",
    "a sketch of the {}.", "a embroidered {}.", "a pixelated photo of a {}.", "itap of the {}.",
    "a jpeg corrupted photo of the {}.", "a good photo of a {}.", "a plushie {}.", "a photo of the nice {}.",
    "a photo of the small {}.", "a photo of the weird {}.", "the cartoon {}.", "art of the {}.",
    "a drawing of the {}.", "a photo of the large {}.", "a black and white photo of a {}.", "the plushie {}.",
    "a dark photo of a {}.", "itap of a {}.", "graffiti of the {}.", "a toy {}.",
    "itap of my {}.", "a photo of a cool {}.", "a photo of a small {}.", "a tattoo of the {}.",
]  # fmt: skip

SETS = {"openai": OPENAI, "cifar": CIFAR, "simple": SIMPLE}


def load_templates(templates: str | list[str] | None) -> list[str] | None:
    """A named set, the lines of a file, or the sentences themselves. Raises UserError when one lacks its {}."""
    if templates is None:
        return None
    sentences = SETS.get(templates) or _lines(templates, "templates") if isinstance(templates, str) else list(templates)
    for sentence in sentences:
        if "{}" not in sentence:
            raise UserError(f"template {sentence!r} has no {{}} where the class name goes")
    return sentences


def load_classnames(classnames: str | list[str] | None) -> list[str] | None:
    """The lines of a file, or the names themselves."""
    return _lines(classnames, "class names") if isinstance(classnames, str) else classnames


def _lines(path: str, what: str) -> list[str]:
    if not Path(path).is_file():
        sets = f", or one of {', '.join(SETS)}" if what == "templates" else ""
        raise UserError(f"{what}: {path} is no file; give a file with one a line{sets}")
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{what}: {path} is empty")
    return lines
