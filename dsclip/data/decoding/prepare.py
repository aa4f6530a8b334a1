"""One sample for training: its caption, its keys, the crop of its image, the numbers of its augmentation, and further views."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from dsclip.config.data_section import DataSection
from dsclip.data.decoding.augment import draw_augmentation
from dsclip.data.decoding.sample import RawSample, decode_image, read_captions, read_group, read_negatives
from dsclip.data.decoding.transforms import train_image


class TrainSample(NamedTuple):
    """A sample that is ready for a batch, but for its images, which lie in the batch already.

    augmentation: see `augment`, of the image and of each further view of it. texts: the captions of further views, in order.
    """

    caption: str
    sample_id: int
    key: int
    hard_negatives: list[str]
    augmentation: tuple[float, ...] | None
    texts: tuple[str, ...] = ()


class Preparer:
    """Makes samples as a recipe's `data` section says. slow_decoded: JPEGs that Pillow read since the fast decoder refused them."""

    def __init__(
        self, data: DataSection, image_size: int, seed: int, hard_negatives: bool, views: tuple[str, ...] = ()
    ):
        """views: the further ones that a batch has, such as image_2 and text_2."""
        self._data, self._image_size, self._seed, self._hard_negatives = data, image_size, seed, hard_negatives
        self._image_views, self._text_views = numbers_of("image", views), numbers_of("text", views)
        self._fast = None
        if data.decoder == "fast":
            from dsclip.data.decoding.fast_image import FastImages

            self._fast = FastImages(image_size, data.crop_scale, data.max_image_pixels)

    @property
    def slow_decoded(self) -> int:
        return 0 if self._fast is None else self._fast.slow_decoded

    def __call__(self, raw: RawSample, round_: int, *images: torch.Tensor) -> TrainSample:
        """The sample; its crops go to images uint8 [3, S, S], one for it and one for each further view. Raises BadSample.

        All randomness is that of (seed, round, sample id), see `order.Draw`, and of a further view's number and kind.
        """
        data = self._data
        captions = read_captions(raw, data.caption_key)
        key = [self._seed, round_, raw.sample_id % 2**63]
        rng = np.random.Generator(np.random.PCG64(key))
        chosen = int(rng.integers(len(captions)))
        caption = captions[chosen]
        negatives = read_negatives(raw, data.negative_key, data.max_negatives) if self._hard_negatives else []
        group = read_group(raw, data.group_key, caption)
        generators = [rng, *(_generator(key, "image", number) for number in self._image_views)]
        drawn: list[float] = []
        for generator, image in zip(generators, images, strict=True):
            self._crop(raw, generator, image)
            drawn += draw_augmentation(data, generator) or ()
        texts = self._other_captions(captions, chosen, key)
        return TrainSample(caption, raw.sample_id, group, negatives, tuple(drawn) or None, texts)

    def _crop(self, raw: RawSample, rng: np.random.Generator, image: torch.Tensor) -> None:
        if self._fast is not None:
            self._fast(raw, rng, image)
        else:
            picture = decode_image(raw, self._data.max_image_pixels)
            image.copy_(train_image(picture, self._image_size, self._data.crop_scale, rng))

    def _other_captions(self, captions: list[str], chosen: int, key: list[int]) -> tuple[str, ...]:
        """Captions of the further views: others than those of the views before, as long as the sample has any."""
        left, texts = captions[:chosen] + captions[chosen + 1 :], []
        for number in self._text_views:
            left = left or list(captions)
            texts.append(left.pop(int(_generator(key, "text", number).integers(len(left)))))
        return tuple(texts)


def numbers_of(kind: str, views: tuple[str, ...]) -> list[int]:
    """The numbers of those views that are images, or texts: 2 for image_2."""
    return [int(view.removeprefix(f"{kind}_")) for view in views if view.startswith(f"{kind}_")]


def _generator(key: list[int], kind: str, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([*key, number, int(kind == "text")]))
