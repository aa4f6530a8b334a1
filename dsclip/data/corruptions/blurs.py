"""Corruptions that move light: blurs and an elastic transform. Pictures, parameters and source as in `pixels`.

Filters are FFTs and lookups in float64, so that neither threads nor batches change a bit.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dsclip.data.corruptions.pixels import Pixels, Random

Indices = NDArray[np.int64]
Outside = Literal["edge", "symmetric"]  # the edge's pixels go on, or the picture is mirrored behind them

GAUSSIAN_BLUR = (1, 2, 3, 4, 6)  # standard deviation, pixels
DEFOCUS_BLUR = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))  # radius, standard deviation of its edge
MOTION_BLUR = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))  # length, standard deviation
MOTION_DEGREES = 45
# (step, number) of the factors 1, 1 + step, …: as many as numpy.arange makes of the source's bounds.
ZOOM_BLUR = ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))
ELASTIC = 244  # the source's factor of these (for 224 pixels, as it stands there): strength, smoothness, affine part
ELASTIC_TRANSFORM = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))


def gaussian_blur(x: Pixels, severity: int, random: Random) -> Pixels:
    """Cut at four standard deviations; the edge's pixels go on outside."""
    return smooth(x, GAUSSIAN_BLUR[severity - 1], 4, "edge")


def defocus_blur(x: Pixels, severity: int, random: Random) -> Pixels:
    """A disc with a soft edge; outside the picture is mirrored."""
    radius, softness = DEFOCUS_BLUR[severity - 1]
    kernel = disc(radius, softness)
    border = len(kernel) // 2
    padded = np.pad(x, ((border, border), (border, border), (0, 0)), "reflect")
    shape = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, shape)[:, :, None]
    return np.fft.irfft2(spectrum, shape, axes=(0, 1))[2 * border :, 2 * border :]


def disc(radius: int, softness: float) -> Pixels:
    """[k, k]: a disc with sum 1, smoothed over 3 x 3 pixels up to a radius of 8, else over 5 x 5.

    The smoothing mirrors at the kernel's edge, which a disc of radius 8 or 10 touches: its sum is 1.01 then, as in the source.
    """
    reach, soft = (8, 1) if radius <= 8 else (radius, 2)
    line = np.arange(-reach, reach + 1)
    sharp = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float64)
    taps = np.exp(-(np.arange(-soft, soft + 1) ** 2) / (2 * softness**2))
    padded = np.pad(sharp, soft, "reflect")
    rows = sum(tap * padded[i : i + len(line)] for i, tap in enumerate(taps / taps.sum()))
    both: Pixels = sum(tap * rows[:, i : i + len(line)] for i, tap in enumerate(taps / taps.sum()))
    return both / float(sharp.sum())


def motion_blur(x: Pixels, severity: int, random: Random) -> Pixels:
    """Half a normal curve along a line, as ImageMagick's motion blur takes it; the edge's pixels go on outside."""
    radius, deviation = MOTION_BLUR[severity - 1]
    return moved(x, radius, deviation, math.radians(random.uniform(-MOTION_DEGREES, MOTION_DEGREES)))


def moved(x: Pixels, radius: int, deviation: float, angle: float) -> Pixels:
    """Each pixel is a mean of those 0 to 2 * radius steps from it in the direction of the angle, in radians, down from the right."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * deviation**2))
    weights /= weights.sum()
    height, width = x.shape[:2]
    blurred = np.zeros_like(x)
    for step, weight in zip(steps, weights, strict=True):
        down, right = math.ceil(step * math.sin(angle) - 0.5), math.ceil(step * math.cos(angle) - 0.5)
        rows, columns = np.arange(height) + down, np.arange(width) + right
        blurred += weight * x[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]
    return blurred


def zoom_blur(x: Pixels, severity: int, random: Random) -> Pixels:
    """The mean of the picture and its centre at several magnifications, that of 1 included again."""
    step, number = ZOOM_BLUR[severity - 1]
    total = x.copy()
    for i in range(number):
        total += zoomed(x, 1 + i * step)
    return total / (number + 1)


def zoomed(x: Pixels, factor: float) -> Pixels:
    """The centre, magnified to the picture's size, linearly between pixels."""
    for axis in (0, 1):
        size = x.shape[axis]
        part = math.ceil(size / factor)
        large = round(part * factor)
        shown = np.arange(size) + (large - size) // 2
        positions = (size - part) // 2 + shown * (part - 1) / (large - 1)
        first = np.minimum(positions.astype(np.int64), size - 2)
        share = (positions - first).reshape(-1, *[1] * (x.ndim - 1 - axis))
        x = x.take(first, axis) * (1 - share) + x.take(first + 1, axis) * share
    return x


def elastic_transform(x: Pixels, severity: int, random: Random) -> Pixels:
    """Three points move and the picture with them, then every pixel by a smooth random field."""
    strength, smoothness, affine = (ELASTIC * c for c in ELASTIC_TRANSFORM[severity - 1])
    height, width = x.shape[:2]
    middle, third = np.array([width // 2, height // 2]), min(height, width) // 3
    before = middle + third * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + random.uniform(-affine, affine, (3, 2))
    # [x, y, 1] @ back: where a pixel of the moved picture was before.
    back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)
    row, column = np.mgrid[:height, :width].astype(np.float64)
    was = np.stack([column, row, np.ones_like(row)], axis=-1) @ back
    x = looked_up(x, was[..., 1], was[..., 0], half=0)
    right, down = (smooth(random.uniform(-1, 1, (height, width)), smoothness, 3, "symmetric") for _ in range(2))
    return looked_up(x, row + strength * down, column + strength * right, half=0.5)


def looked_up(x: Pixels, rows: Pixels, columns: Pixels, half: float) -> Pixels:
    """x [H, W, C] at positions [h, w], linear between pixels, mirrored outside: at the edge's pixels (half = 0) or behind them (0.5)."""
    (top, bottom, down), (left, right, across) = (
        _between(_mirrored(positions, size, half), size)
        for positions, size in ((rows, x.shape[0]), (columns, x.shape[1]))
    )
    upper = x[top, left] * (1 - across) + x[top, right] * across
    lower = x[bottom, left] * (1 - across) + x[bottom, right] * across
    return upper * (1 - down) + lower * down


def _mirrored(positions: Pixels, size: int, half: float) -> Pixels:
    reach = size - 1 + 2 * half
    inside = np.abs((positions + half + reach) % (2 * reach) - reach)
    return (inside - half).clip(0, size - 1)


def _between(positions: Pixels, size: int) -> tuple[Indices, Indices, Pixels]:
    first = np.minimum(positions.astype(np.int64), size - 2)
    return first, first + 1, (positions - first)[..., None]


def smooth(x: Pixels, deviation: float, cut: float, outside: Outside) -> Pixels:
    """x [H, W, ...] under a normal curve, cut at so many standard deviations."""
    radius = int(cut * deviation + 0.5)
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * deviation**2))
    taps /= taps.sum()
    for axis in (0, 1):
        padded = np.pad(x, [(radius, radius) if i == axis else (0, 0) for i in range(x.ndim)], outside)
        length = padded.shape[axis]
        factors = np.fft.rfft(taps, length).reshape(-1, *[1] * (x.ndim - 1 - axis))
        x = np.fft.irfft(np.fft.rfft(padded, axis=axis) * factors, length, axis=axis).take(
            range(2 * radius, length), axis
        )
    return x
