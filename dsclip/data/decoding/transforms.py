"""CLIP's image preprocessing with PIL: uint8 in, uint8 out; normalisation happens on the device."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ASPECT_RATIO = (3 / 4, 4 / 3)  # of the random crop, torchvision's default, which CLIP and OpenCLIP keep
CROP_TRIES = 10


def eval_image(image: Image.Image, size: int) -> Tensor:
    """Resize the shorter side to `size` (bicubic, antialiased), then crop the centre. Returns uint8 [3, size, size]."""
    return to_uint8(resized_and_cropped(image, size))


def resized_and_cropped(image: Image.Image, size: int) -> Image.Image:
    """The same as a picture."""
    width, height = image.size
    if width <= height:
        target = (size, int(size * height / width))
    else:
        target = (int(size * width / height), size)
    if image.size != target:
        image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    return image.crop((left, top, left + size, top + size))


def train_image(image: Image.Image, size: int, crop_scale: list[float], rng: np.random.Generator) -> Tensor:
    """A random crop of `crop_scale` of the area, resized to `size` (bicubic, antialiased). Returns uint8 [3, size, size].

    All randomness comes from `rng`, which the caller seeds with (seed, epoch, sample id).
    """
    box = random_crop(image.width, image.height, crop_scale, rng)
    return to_uint8(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def random_crop(
    width: int, height: int, crop_scale: list[float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) as torchvision's RandomResizedCrop draws it, whole image in the worst case.

    Of a scale of [1, 1] nothing is drawn: the box is the whole image, or where that is longer than the ratios allow its middle.
    """
    low, high = (math.log(r) for r in ASPECT_RATIO)
    least, most = crop_scale
    for _ in range(CROP_TRIES if least < 1 else 0):  # rounded, a drawn box may be a pixel smaller than the image
        area = width * height * rng.uniform(least, most)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    ratio = width / height
    w = min(width, round(height * ASPECT_RATIO[1])) if ratio > ASPECT_RATIO[1] else width
    h = min(height, round(width / ASPECT_RATIO[0])) if ratio < ASPECT_RATIO[0] else height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def to_uint8(image: Image.Image) -> Tensor:
    """uint8 [3, H, W] of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
