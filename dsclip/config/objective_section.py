"""The objective section: terms that are added to the loss of the pairs."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, Strict
from pydantic.dataclasses import dataclass

from dsclip.config.kinds import STRICT, Interval, Jitter, NotNegative, PositiveFloat, Rule, Share

# A list element is read from a mapping, which pydantic's strict mode refuses; so each of its fields is strict instead.
ELEMENT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
FEATURE = re.compile(r"(image|text)(_[2-9])?")
FURTHER = re.compile(r"(image|text)_[2-9]")


def _different_features(names: list[str]) -> bool:
    known = all(FEATURE.fullmatch(name) for name in names)
    return bool(names) and known and len(set(names)) == len(names)


Between = Annotated[
    list[str],
    Strict(),
    Rule(_different_features, "different ones of image, text and further views: image_2, text_2, … up to _9"),
]


@dataclass(frozen=True, config=ELEMENT)
class TermSection:
    """One term of the objective."""

    name: Annotated[str, Strict()]
    """`contrast` (InfoNCE between two features), or one of your own."""
    between: Between
    """The features that it compares: `image`, `text`, or further views of the same samples, such as `image_2` and `text_2`."""
    weight: Annotated[PositiveFloat, Strict()] = 1.0
    """What its value and gradients are multiplied by in the sum."""
    temperature: Annotated[float | None, Strict(), Field(ge=1e-3)] = None
    """Its own, which stays as it is; null: that of the loss section, to whose gradient it then adds."""
    duplicates: Literal["negative", "positive", "mask"] | None = None
    """What samples with equal keys are to each other in it: `positive` with `data.group_key` a class is supervised contrastive learning; null: as in the loss section."""

    @property
    def title(self) -> str:
        """What its value is called among the numbers of a step, such as `contrast_image_image_2`."""
        return "_".join((self.name, *self.between))


@dataclass(frozen=True, config=ELEMENT)
class ViewSection:
    """How the loader makes a further view; what is left out is as in the data section."""

    name: Annotated[str, Strict(), Rule(lambda x: FURTHER.fullmatch(x) is not None, "image_2, text_2, … up to _9")]
    """Of a view that a term compares."""
    crop_scale: Annotated[Interval | None, Strict()] = None
    """Of an image: share of the area that its crop keeps; SimCLR [0.08, 1.0]."""
    flip: Annotated[bool | None, Strict()] = None
    """Of an image: horizontal flips."""
    color_jitter: Annotated[Jitter | None, Strict()] = None
    """Of an image: brightness, contrast, saturation, hue; SimCLR [0.8, 0.8, 0.8, 0.2], SLIP half of it."""
    grayscale: Annotated[Share | None, Strict()] = None
    """Of an image: share of them that lose their colour; SimCLR 0.2."""
    caption: Literal["other", "same"] | None = None
    """Of a text: `other`, another of the sample's captions, or `same`, the one of `text`; null: `other`."""
    word_repetition: Annotated[float | None, Strict(), Field(gt=0, le=1)] = None
    """Of a text: share of its words, at least two, of which up to all are written twice; ESimCSE 0.32. null: none are."""


# The keys of a view by its kind: those of the other say nothing about it.
VIEW_KEYS = {"image": ("crop_scale", "flip", "color_jitter", "grayscale"), "text": ("caption", "word_repetition")}


@dataclass(frozen=True, config=STRICT)
class ObjectiveSection:
    """The weighted sum that is minimised: the loss of the loss section and further terms; docs/objectives.md."""

    pair_weight: NotNegative = 1.0
    """Of the loss between images and their captions."""
    terms: list[TermSection] = field(default_factory=list)
    """Further terms, such as [{name: contrast, between: [image, image_2], temperature: 0.1}]; none: the loss alone."""
    plugin: str | None = None
    """Python file or module that registers your own terms."""
    views: list[ViewSection] = field(default_factory=list)
    """How further views are made, such as [{name: image_2, crop_scale: [0.3, 1.0]}, {name: text_2, word_repetition: 0.32}]."""

    @property
    def titles(self) -> list[str]:
        """Of each term; of those that compare the same features, the second has `.2` behind it, and so on."""
        plain = [term.title for term in self.terms]
        numbers = [plain[: i + 1].count(title) for i, title in enumerate(plain)]
        return [title if number == 1 else f"{title}.{number}" for title, number in zip(plain, numbers, strict=True)]

    @property
    def further_views(self) -> tuple[str, ...]:
        """The views beyond image and text that the terms compare, in order."""
        return tuple(sorted({name for term in self.terms for name in term.between} - {"image", "text"}))

    @property
    def needs_keys(self) -> bool:
        """Whether a term tells samples with equal keys apart, whatever the loss section does."""
        return any(term.duplicates not in (None, "negative") for term in self.terms)

    @property
    def view_settings(self) -> tuple[ViewSection, ...]:
        """Of each further view, in their order."""
        given = {view.name: view for view in self.views}
        return tuple(given.get(name, ViewSection(name)) for name in self.further_views)
