"""One sample for training: its caption, its keys, the crop of its image, and the numbers of its augmentation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from dsclip.config.data_section import DataSection
from dsclip.data.decoding.augment import draw_augmentation
from dsclip.data.decoding.sample import RawSample, decode_image, read_captions, read_group, read_negatives
from dsclip.data.decoding.transforms import train_image


class TrainSample(NamedTuple):
    """A sample that is ready for a batch, but for its image, which lies in the batch already. augmentation: see `augment`."""

    caption: str
    sample_id: int
    key: int
    hard_negatives: list[str]
    augmentation: tuple[float, ...] | None


class Preparer:
    """Makes samples as a recipe's `data` section says. slow_decoded: JPEGs that Pillow read since the fast decoder refused them."""

    def __init__(self, data: DataSection, image_size: int, seed: int, hard_negatives: bool):
        self._data, self._image_size, self._seed, self._hard_negatives = data, image_size, seed, hard_negatives
        self._fast = None
        if data.decoder == "fast":
            from dsclip.data.decoding.fast_image import FastImages

            self._fast = FastImages(image_size, data.crop_scale, data.max_image_pixels)

    @property
    def slow_decoded(self) -> int:
        return 0 if self._fast is None else self._fast.slow_decoded

    def __call__(self, raw: RawSample, round_: int, image: torch.Tensor) -> TrainSample:
        """The sample; its crop goes to image uint8 [3, S, S]. Raises BadSample.

        All randomness is that of (seed, round, sample id), see `order.Draw`.
        """
        data = self._data
        captions = read_captions(raw, data.caption_key)
        sample_id = raw.sample_id
        rng = np.random.Generator(np.random.PCG64([self._seed, round_, sample_id % 2**63]))
        caption = captions[int(rng.integers(len(captions)))]
        negatives = read_negatives(raw, data.negative_key, data.max_negatives) if self._hard_negatives else []
        key = read_group(raw, data.group_key, caption)
        if self._fast is not None:
            self._fast(raw, rng, image)
        else:
            picture = decode_image(raw, data.max_image_pixels)
            image.copy_(train_image(picture, self._image_size, data.crop_scale, rng))
        return TrainSample(caption, sample_id, key, negatives, draw_augmentation(data, rng))
