"""The fast way from an image file to a training crop: JPEG decoded no larger than the crop needs, resized in uint8.

JPEGs with errors that libjpeg-turbo's strict interface refuses and Pillow reads (stray bytes between segments) are left to Pillow, and
counted: a data set should not depend on the decoder. The slow way, `transforms.train_image`, is CLIP's own preprocessing with PIL; tests compare the two. torch's antialiased
bicubic on uint8 gives PIL's numbers (mean difference 0.04 of 255) in a fifth of its time; only the scaled decoding differs.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

from dsclip.data.decoding.sample import BadSample, RawSample, decode_image, image_bytes
from dsclip.data.decoding.transforms import random_crop

# The crop keeps at least so many times the pixels of the result, a side: below, JPEG's scaled decoding blurs visibly.
SPARE = 1.5
JPEG_MAGIC = b"\xff\xd8\xff"


class FastImages:
    """Makes training crops of one size. Keeps its memory: fresh pages cost as much as decoding a small JPEG."""

    def __init__(self, size: int, crop_scale: list[float], max_pixels: int):
        self._size, self._crop_scale, self._max_pixels = size, crop_scale, max_pixels
        self._decoded = np.empty(1 << 20, dtype=np.uint8)
        self.slow_decoded = 0

    def __call__(self, raw: RawSample, rng: np.random.Generator, out: Tensor) -> None:
        """Writes the crop that `rng` draws, the one `train_image` takes, to out uint8 [3, size, size]. Raises BadSample."""
        content = image_bytes(raw)
        if content.startswith(JPEG_MAGIC):
            image, box = self._decode(raw, content, rng)
        else:
            image, box = self._slowly(raw, rng)
        left, top, right, bottom = (round(x) for x in box)
        crop = image[top : max(bottom, top + 1), left : max(right, left + 1)]
        pixels = torch.from_numpy(crop).permute(2, 0, 1)[None]  # channels last, as torch's uint8 kernel wants it
        size = (self._size, self._size)
        out.copy_(F.interpolate(pixels, size, mode="bicubic", antialias=True)[0])

    def _slowly(self, raw: RawSample, rng: np.random.Generator) -> tuple[np.ndarray, tuple[float, ...]]:
        image = np.array(decode_image(raw, self._max_pixels))
        return image, random_crop(image.shape[1], image.shape[0], self._crop_scale, rng)

    def _decode(self, raw: RawSample, content: bytes, rng: np.random.Generator) -> tuple[np.ndarray, tuple[float, ...]]:
        """(pixels, the crop's box in them), no larger than the crop needs."""
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(content)
        except ValueError:
            image, box = self._slowly(raw, rng)
            self.slow_decoded += 1
            return image, box
        if width * height > self._max_pixels:
            raise BadSample("too many pixels")
        left, top, right, bottom = random_crop(width, height, self._crop_scale, rng)
        scale = min(1.0, SPARE * self._size / min(right - left, bottom - top))
        least = (int(height * scale) + 1, int(width * scale) + 1) if scale < 1 else (0, 0)
        if self._decoded.size < 3 * width * height:
            self._decoded = np.empty(3 * width * height, dtype=np.uint8)
        try:
            image = simplejpeg.decode_jpeg(content, "RGB", min_height=least[0], min_width=least[1], min_factor=1,
                                           buffer=self._decoded)  # fmt: skip
        except ValueError:
            image = np.array(decode_image(raw, self._max_pixels))
            self.slow_decoded += 1
            return image, (left, top, right, bottom)
        across, down = image.shape[1] / width, image.shape[0] / height
        return image, (left * across, top * down, right * across, bottom * down)
