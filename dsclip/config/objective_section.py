"""The objective section: terms that are added to the loss of the pairs."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, Strict
from pydantic.dataclasses import dataclass

from dsclip.config.kinds import STRICT, Interval, Jitter, NotNegative, Positive, PositiveFloat, Rule, Share

# A list element is read from a mapping, which pydantic's strict mode refuses; so each of its fields is strict instead.
ELEMENT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
HEAD = re.compile(r"[a-z][a-z0-9_]*")
FEATURE = re.compile(rf"(image|text)(_[2-9])?(\.{HEAD.pattern})?")
FURTHER = re.compile(r"(image|text)_[2-9]")
TOWERS = ("image", "text")


def _different_features(names: list[str]) -> bool:
    known = all(FEATURE.fullmatch(name) for name in names)
    return bool(names) and known and len(set(names)) == len(names)


def _name_of_a_head(name: str) -> bool:
    return HEAD.fullmatch(name) is not None and name not in TOWERS


Between = Annotated[
    list[str],
    Strict(),
    Rule(
        _different_features,
        "different ones of image, text and further views, image_2, text_2, … up to _9, or of a head: image.NAME, image_2.NAME, …",
    ),
]


def view_of(feature: str) -> str:
    """The view whose feature it is: image_2 of image_2.projector."""
    return feature.partition(".")[0]


def tower_of(feature: str) -> str:
    """The tower that makes it: image or text."""
    return view_of(feature).partition("_")[0]


def head_of(feature: str) -> str | None:
    """The head that makes it; None for the tower's projection."""
    return feature.partition(".")[2] or None


@dataclass(frozen=True, config=ELEMENT)
class TermSection:
    """One term of the objective."""

    name: Annotated[str, Strict()]
    """`contrast` (InfoNCE between two features), `supervised_contrast` (of samples with equal keys, over all views), `swav` (swapped prediction of prototypes), `cross_entropy` (of a classifier), `distill` (a teacher's similarities), `distill_features` (its features), or one of your own."""
    between: Between
    """The features that it compares: `image`, `text`, or further views of the same samples, such as `image_2` and `text_2`; those of a head \
with its name behind the view's: `image_2.projector`."""
    weight: Annotated[PositiveFloat, Strict()] = 1.0
    """What its value and gradients are multiplied by in the sum."""
    temperature: Annotated[float | None, Strict(), Field(ge=1e-3)] = None
    """Its own, which stays as it is; null: of `contrast` that of the loss section, to whose gradient it then adds, of `supervised_contrast` 0.07 and of `swav` 0.1."""
    duplicates: Literal["negative", "positive", "mask"] | None = None
    """What samples with equal keys are to each other in it: `positive` with `data.group_key` a class is supervised contrastive learning; null: as in the loss section."""
    epsilon: Annotated[float | None, Strict(), Field(ge=1e-3)] = None
    """Of `swav`: how even the codes of a sample are, against how well they fit; null: 0.05."""
    iterations: Annotated[int | None, Strict(), Field(gt=0, le=1000)] = None
    """Of `swav`: of Sinkhorn-Knopp, by which all prototypes get equal shares of the global batch; null: 3."""
    label_smoothing: Annotated[float | None, Strict(), Field(ge=0, lt=1)] = None
    """Of `cross_entropy`: share of the target spread over all classes; null: 0."""
    mixup: Annotated[float | None, Strict(), Field(gt=0, le=100)] = None
    """Of `supervised_contrast`: α of the Beta(α, α) by which a hard positive and a hard negative of each feature are mixed; Core-tuning 1. null: none are."""
    mixed: Literal["both", "positive", "negative"] | None = None
    """Of `supervised_contrast` with `mixup`: which of the two are made; null: both."""
    focal: Annotated[bool | None, Strict()] = None
    """Of `supervised_contrast`: weighs each positive by what it lacks, 1 − p; null: all weigh the same."""

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
    word_span: Annotated[Interval | None, Strict()] = None
    """Of a text: share of its words, drawn between these two, that are kept, next to each other at a random place (Contriever). null: all are."""


SUPERVISED = "supervised_contrast"  # by the keys of samples
DISTILLING = ("distill", "distill_features")  # terms that need a teacher
STORED = "stored"  # a teacher whose features are in the shards

# The keys of a view by its kind: those of the other say nothing about it.
VIEW_KEYS = {
    "image": ("crop_scale", "flip", "color_jitter", "grayscale"),
    "text": ("caption", "word_repetition", "word_span"),
}


@dataclass(frozen=True, config=ELEMENT)
class HeadSection:
    """A named end of a tower beside its projection, for terms alone: no export has it."""

    name: Annotated[
        str, Strict(), Rule(_name_of_a_head, "small letters, digits and _, a letter first, and neither image nor text")
    ]
    """By which terms and `of` know it."""
    kind: Literal["projector", "prototypes", "classifier"]
    """`projector`: a layer of hidden units before a unit feature; `prototypes`: the cosines with learned vectors; `classifier`: a linear layer, a number for each class."""
    of: Annotated[str, Strict()]
    """What it is put on: `image` or `text`, what that tower pools before its projection, or the name of a projector."""
    width: Annotated[Positive, Strict()]
    """Numbers that it gives: of a projector's feature, or one for each prototype or class."""
    hidden: Annotated[Positive | None, Strict()] = None
    """Of a projector: its hidden units; null: as many as the tower's width."""


@dataclass(frozen=True, config=STRICT)
class ObjectiveSection:
    """The weighted sum that is minimised: the loss of the loss section and further terms; docs/objectives.md."""

    pair_weight: NotNegative = 1.0
    """Of the loss between images and their captions."""
    terms: list[TermSection] = field(default_factory=list)
    """Further terms, such as [{name: contrast, between: [image, image_2], temperature: 0.1}]; none: the loss alone."""
    plugin: str | None = None
    """Python file or module that registers your own terms."""
    heads: list[HeadSection] = field(default_factory=list)
    """Named ends of towers beside their projections, such as [{name: projector, kind: projector, of: image, width: 256}]."""
    views: list[ViewSection] = field(default_factory=list)
    """How further views are made, such as [{name: image_2, crop_scale: [0.3, 1.0]}, {name: text_2, word_repetition: 0.32}]."""

    teacher: str | None = None
    """Of `distill` and `distill_features`: a folder or name as `model.init` takes it, or `stored` for what `tools/reinforce_shards.py` wrote into the shards."""
    teacher_temperature: Annotated[float | None, Field(ge=1e-3)] = None
    """Of the teacher's similarities; null: the teacher's own."""

    @property
    def titles(self) -> list[str]:
        """Of each term; of those that compare the same features, the second has `.2` behind it, and so on."""
        plain = [term.title for term in self.terms]
        numbers = [plain[: i + 1].count(title) for i, title in enumerate(plain)]
        return [title if number == 1 else f"{title}.{number}" for title, number in zip(plain, numbers, strict=True)]

    @property
    def further_views(self) -> tuple[str, ...]:
        """The views beyond image and text that the terms compare, in order."""
        return tuple(sorted({view_of(name) for term in self.terms for name in term.between} - set(TOWERS)))

    @property
    def distils(self) -> bool:
        """Whether a term needs a teacher."""
        return any(term.name in DISTILLING for term in self.terms)

    @property
    def needs_keys(self) -> bool:
        """Whether a term tells samples with equal keys apart, whatever the loss section does."""
        return any(term.duplicates not in (None, "negative") or term.name == SUPERVISED for term in self.terms)

    @property
    def classes(self) -> int:
        """Of the classifiers; 0 without any."""
        return max((head.width for head in self.heads if head.kind == "classifier"), default=0)

    @property
    def view_settings(self) -> tuple[ViewSection, ...]:
        """Of each further view, in their order."""
        given = {view.name: view for view in self.views}
        return tuple(given.get(name, ViewSection(name)) for name in self.further_views)

    def tower_of_head(self, head: HeadSection) -> str:
        """The tower that a head belongs to, also by way of a projector."""
        return head.of if head.of in TOWERS else next((x.of for x in self.heads if x.name == head.of), head.of)

    def width_of(self, feature: str, embedding: int) -> int:
        """Numbers of a feature. embedding: of those of projections, the model's embedding width."""
        return next((head.width for head in self.heads if head.name == head_of(feature)), embedding)

    def heads_of(self, tower: str) -> tuple[HeadSection, ...]:
        """Those of a tower, in their order."""
        return tuple(head for head in self.heads if self.tower_of_head(head) == tower)


PAIRS_ALONE = ObjectiveSection()
