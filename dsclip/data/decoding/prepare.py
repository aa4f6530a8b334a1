"""One sample for training: its caption, its keys, the crop of its image, the numbers of its augmentation, and further views."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dsclip.config.data_section import DataSection
from dsclip.config.objective_section import VIEW_KEYS, ViewSection
from dsclip.data.decoding.augment import IDENTITY, augments, draw_augmentation
from dsclip.data.decoding.class_prompts import class_prompts
from dsclip.data.decoding.repeat_words import repeat_words
from dsclip.data.decoding.sample import (
    RawSample,
    decode_image,
    read_captions,
    read_class,
    read_group,
    read_negatives,
    read_teacher,
)
from dsclip.data.decoding.transforms import train_image
from dsclip.data.decoding.word_span import span_of_words

if TYPE_CHECKING:  # it loads a decoder that a recipe may do without
    from dsclip.data.decoding.fast_image import FastImages


class TrainSample(NamedTuple):
    """A sample that is ready for a batch, but for its images, which lie in the batch already.

    augmentation: see `augment`, of the image and of each further view of it. texts: the captions of further views, in order.
    label: its class; None where nobody asks.
    """

    caption: str
    sample_id: int
    key: int
    hard_negatives: list[str]
    augmentation: tuple[float, ...] | None
    texts: tuple[str, ...] = ()
    label: int | None = None
    teacher: NDArray[np.float32] | None = None
    """A teacher's features of the image and of the caption, [2, D]."""


class Preparer:
    """Makes samples as a recipe's `data` section says. slow_decoded: JPEGs that Pillow read since the fast decoder refused them."""

    def __init__(
        self, data: DataSection, image_size: int, seed: int, hard_negatives: bool, views: tuple[ViewSection, ...] = (),
        classes: int = 0, taught_passes: int | None = None,
    ):  # fmt: skip
        """views: the further ones that a batch has, such as image_2 and text_2. classes: how many there are, where samples need one.
        taught_passes: of the stored features of a teacher; later rounds show what the first ones showed, for which there are features."""
        self._classes, self._taught_passes = classes, taught_passes
        self._data, self._image_size, self._seed, self._hard_negatives = data, image_size, seed, hard_negatives
        self._image_views, self._text_views = of_kind("image", views), of_kind("text", views)
        self._images = [data, *(_image_settings(data, view) for view in self._image_views)]
        self._augments = any(map(augments, self._images))
        self._fast: list[FastImages] = []
        self._prompts = class_prompts(data)
        if data.decoder == "fast":
            from dsclip.data.decoding.fast_image import FastImages

            self._fast = [FastImages(image_size, of.crop_scale, of.max_image_pixels) for of in self._images]

    @property
    def slow_decoded(self) -> int:
        return sum(fast.slow_decoded for fast in self._fast)

    def __call__(self, raw: RawSample, round_: int, *images: torch.Tensor) -> TrainSample:
        """The sample; its crops go to images uint8 [3, S, S], one for it and one for each further view. Raises BadSample.

        All randomness is that of (seed, round, sample id), see `order.Draw`, and of a further view's number and kind.
        """
        data = self._data
        if self._taught_passes is not None:
            round_ %= self._taught_passes
        name, captions = (
            (None, read_captions(raw, data.caption_key)) if self._prompts is None else self._prompts.of(raw)
        )
        key = [self._seed, round_, raw.sample_id % 2**63]
        rng = np.random.Generator(np.random.PCG64(key))
        chosen = int(rng.integers(len(captions)))
        caption = captions[chosen]
        negatives = read_negatives(raw, data.negative_key, data.max_negatives) if self._hard_negatives else []
        group = read_group(raw, data.group_key, caption if name is None else name)
        label = read_class(raw, self._classes) if self._classes else None
        generators = [rng, *(_generator(key, view) for view in self._image_views)]
        drawn: list[float] = []
        for index, (generator, image) in enumerate(zip(generators, images, strict=True)):
            self._crop(raw, index, generator, image)
            if self._augments:
                drawn += draw_augmentation(self._images[index], generator) or IDENTITY
        texts = self._texts(captions, chosen, key)
        teacher = None if self._taught_passes is None else read_teacher(raw, round_)
        return TrainSample(caption, raw.sample_id, group, negatives, tuple(drawn) or None, texts, label, teacher)

    def _crop(self, raw: RawSample, index: int, rng: np.random.Generator, image: torch.Tensor) -> None:
        if self._fast:
            self._fast[index](raw, rng, image)
        else:
            picture = decode_image(raw, self._data.max_image_pixels)
            image.copy_(train_image(picture, self._image_size, self._images[index].crop_scale, rng))

    def _texts(self, captions: list[str], chosen: int, key: list[int]) -> tuple[str, ...]:
        """Of the further views: others than those of the views before, as long as the sample has any, or the same one."""
        left, texts = captions[:chosen] + captions[chosen + 1 :], []
        for view in self._text_views:
            rng, text = _generator(key, view), captions[chosen]
            if view.caption != "same":
                left = left or list(captions)
                text = left.pop(int(rng.integers(len(left))))
            text = text if view.word_span is None else span_of_words(text, view.word_span, rng)
            texts.append(text if view.word_repetition is None else repeat_words(text, view.word_repetition, rng))
        return tuple(texts)


def of_kind(kind: str, views: tuple[ViewSection, ...]) -> list[ViewSection]:
    """Those that are images, or texts."""
    return [view for view in views if view.name.startswith(kind)]


def _image_settings(data: DataSection, view: ViewSection) -> DataSection:
    """The data section as it is for a further view of the image."""
    own = {key: getattr(view, key) for key in VIEW_KEYS["image"]}
    return replace(data, **{key: value for key, value in own.items() if value is not None})


def _generator(key: list[int], view: ViewSection) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([*key, int(view.name[-1]), int(view.name.startswith("text"))]))
