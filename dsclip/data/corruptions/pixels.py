"""Corruptions that change pixels where they are: noise, light, colour, fog, and what a file format does.

Pictures are float64 [H, W, 3] in 0..1; results may leave that range and are clipped by the caller. Parameters of severities
1 to 5 and definitions: Hendrycks & Dietterich 2019, ImageNet-C/create_c/make_imagenet_c.py of hendrycks/robustness.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.float64]
Random = np.random.Generator

GAUSSIAN_NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation
SHOT_NOISE = (60, 25, 12, 5, 3)  # photons of a white pixel
IMPULSE_NOISE = (0.03, 0.06, 0.09, 0.17, 0.27)  # share of values that become 0 or 1
SPECKLE_NOISE = (0.15, 0.2, 0.35, 0.45, 0.6)  # standard deviation, as a share of the value
FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))  # thickness, decay of detail
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the value of HSV
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # of what a pixel differs from the mean
SATURATE = ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2))  # factor and summand of HSV's saturation
PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)  # of a side's pixels
JPEG = (25, 18, 15, 10, 7)  # quality


def gaussian_noise(x: Pixels, severity: int, random: Random) -> Pixels:
    """The same normal noise for dark and bright."""
    return x + random.normal(scale=GAUSSIAN_NOISE[severity - 1], size=x.shape)


def shot_noise(x: Pixels, severity: int, random: Random) -> Pixels:
    """Photons are counted."""
    photons = SHOT_NOISE[severity - 1]
    return random.poisson(x * photons) / photons


def impulse_noise(x: Pixels, severity: int, random: Random) -> Pixels:
    """Salt and pepper, in each colour for itself."""
    hit = random.random(x.shape) < IMPULSE_NOISE[severity - 1]
    return np.where(hit, (random.random(x.shape) < 0.5).astype(np.float64), x)


def speckle_noise(x: Pixels, severity: int, random: Random) -> Pixels:
    """Noise in proportion to the value."""
    return x + x * random.normal(scale=SPECKLE_NOISE[severity - 1], size=x.shape)


def fog(x: Pixels, severity: int, random: Random) -> Pixels:
    """A plasma fractal is added, and the picture darkened so that its brightest value stays."""
    thickness, decay = FOG[severity - 1]
    height, width = x.shape[:2]
    cloud = plasma(1 << (max(height, width) - 1).bit_length(), decay, random)[:height, :width, None]
    brightest = float(x.max())
    return (x + thickness * cloud) * brightest / (brightest + thickness)


def plasma(size: int, decay: float, random: Random) -> Pixels:
    """[size, size] in 0..1 by the diamond-square algorithm on a torus; size is a power of two."""
    heights = np.zeros((size, size))
    step, wibble = size, 100.0

    def filled(corners: Pixels) -> Pixels:
        # The noise grows with the square of `wibble`: so in the source, whose severities were chosen with it.
        return corners / 4 + wibble * random.uniform(-wibble, wibble, corners.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        rows = corners + np.roll(corners, -1, axis=0)
        centres = filled(rows + np.roll(rows, -1, axis=1))
        heights[half::step, half::step] = centres
        across = centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        heights[::step, half::step] = filled(across)
        down = centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        heights[half::step, ::step] = filled(down)
        step, wibble = half, wibble / decay
    heights -= float(heights.min())
    return heights / float(heights.max())


def brightness(x: Pixels, severity: int, random: Random) -> Pixels:
    """A larger value of HSV, hue and saturation as they were: all colours of a pixel times the same; black becomes grey."""
    value: Pixels = x.max(axis=2, keepdims=True)
    brighter = np.minimum(value + BRIGHTNESS[severity - 1], 1)
    return np.where(value > 0, x / np.where(value > 0, value, 1), 1) * brighter


def contrast(x: Pixels, severity: int, random: Random) -> Pixels:
    """Pixels come closer to their colour's mean."""
    means: Pixels = x.mean(axis=(0, 1), keepdims=True)
    return (x - means) * CONTRAST[severity - 1] + means


def saturate(x: Pixels, severity: int, random: Random) -> Pixels:
    """Another saturation of HSV, hue and value as they were. Grey has hue 0 and becomes reddish where the summand isn't 0."""
    factor, summand = SATURATE[severity - 1]
    value: Pixels = x.max(axis=2, keepdims=True)
    below = value - x
    spread: Pixels = below.max(axis=2, keepdims=True)
    direction = np.where(spread > 0, below / np.where(spread > 0, spread, 1), np.array([0.0, 1.0, 1.0]))
    saturation = np.clip(spread / np.where(value > 0, value, 1) * factor + summand, 0, 1)
    return value * (1 - saturation * direction)


def pixelate(x: Pixels, severity: int, random: Random) -> Pixels:
    """Made smaller and large again, both with a box filter."""
    picture, share = to_picture(x), PIXELATE[severity - 1]
    small = picture.resize((int(picture.width * share), int(picture.height * share)), Image.Resampling.BOX)
    return to_pixels(small.resize(picture.size, Image.Resampling.BOX))


def jpeg_compression(x: Pixels, severity: int, random: Random) -> Pixels:
    """Written as JPEG and read."""
    file = BytesIO()
    to_picture(x).save(file, "JPEG", quality=JPEG[severity - 1])
    with Image.open(file) as read:
        return to_pixels(read)


def to_pixels(picture: Image.Image) -> Pixels:
    """[H, W, 3] in 0..1 of an RGB picture."""
    return np.asarray(picture, dtype=np.float64) / 255


def to_picture(x: Pixels) -> Image.Image:
    """The RGB picture, clipped and rounded to the nearest (ImageNet-C rounds down, half a level darker on average)."""
    return Image.fromarray((x * 255).round().clip(0, 255).astype(np.uint8))
