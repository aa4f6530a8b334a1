"""The objective section: terms that are added to the loss of the pairs."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated

from pydantic import ConfigDict, Strict
from pydantic.dataclasses import dataclass

from dsclip.config.kinds import STRICT, NotNegative, PositiveFloat, Rule

# A list element is read from a mapping, which pydantic's strict mode refuses; so each of its fields is strict instead.
ELEMENT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
FEATURE = re.compile(r"(image|text)(_[2-9])?")


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
    temperature: Annotated[PositiveFloat | None, Strict()] = None
    """Its own, which stays as it is; null: that of the loss section, to whose gradient it then adds."""

    @property
    def title(self) -> str:
        """What its value is called among the numbers of a step, such as `contrast_image_image_2`."""
        return "_".join((self.name, *self.between))


@dataclass(frozen=True, config=STRICT)
class ObjectiveSection:
    """The weighted sum that is minimised: the loss of the loss section and further terms; docs/objectives.md."""

    pair_weight: NotNegative = 1.0
    """Of the loss between images and their captions."""
    terms: list[TermSection] = field(default_factory=list)
    """Further terms, such as [{name: contrast, between: [image, image_2], temperature: 0.1}]; none: the loss alone."""
    plugin: str | None = None
    """Python file or module that registers your own terms."""

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
