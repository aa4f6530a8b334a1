"""Flips and colour jitter on the device, by numbers that the loader drew from (seed, epoch, sample id).

A sample's numbers: whether it is flipped, factors of brightness, contrast and saturation, a turn of the hue, whether it
becomes grey. OpenCLIP's --aug-cfg color_jitter has the same parameters; the order of the four is fixed here.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dsclip.config.data_section import DataSection

GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL and torchvision
IDENTITY = (0.0, 1.0, 1.0, 1.0, 0.0, 0.0)


def draw_augmentation(data: DataSection, rng: np.random.Generator) -> tuple[float, ...] | None:
    """(flip, brightness, contrast, saturation, hue, grey) of one sample; None when the recipe augments nothing."""
    if not augments(data):
        return None
    flip = float(data.flip and rng.random() < 0.5)
    jitter: tuple[float, ...] = IDENTITY[1:5]
    if data.color_jitter and rng.random() < data.color_jitter_probability:
        *spread, hue = data.color_jitter
        jitter = (*(float(rng.uniform(max(0.0, 1 - s), 1 + s)) for s in spread), float(rng.uniform(-hue, hue)))
    return flip, *jitter, float(rng.random() < data.grayscale)


def augments(data: DataSection) -> bool:
    """Whether any image may be changed."""
    return bool(data.flip or data.color_jitter or data.grayscale)


def augment(images: Tensor, numbers: Tensor) -> Tensor:
    """uint8 images [n, 3, S, S] changed by numbers [n, 6], as uint8. Rows with nothing to change stay bit for bit.

    The numbers are best in host memory, also of images on a GPU: then nothing waits for it.
    """
    flip, jitter = numbers[:, 0] > 0, numbers[:, 1:]
    if flip.any():
        images = torch.where(_beside(flip, images)[:, None, None, None], images.flip(3), images)
    changed = (jitter != jitter.new_tensor(IDENTITY[1:])).any(1).nonzero()[:, 0]
    if not len(changed):
        return images
    jitter, changed = _beside(jitter[changed].float(), images), _beside(changed, images)
    return images.index_copy(0, changed, _jitter(images[changed].float(), jitter))


def _beside(x: Tensor, images: Tensor) -> Tensor:
    """x on the images' device, without waiting for the copy."""
    if x.device.type == "cpu" and images.device.type == "cuda":
        x = x.pin_memory()
    return x.to(images.device, non_blocking=True)


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """values as float32 [k, 1, 1], copied to a device once."""
    return torch.tensor(values, device=device)[:, None, None]


def _jitter(x: Tensor, numbers: Tensor) -> Tensor:
    brightness, contrast, saturation, hue, grey = (n[:, None, None, None] for n in numbers.unbind(1))
    x = (x * brightness).clamp(0, 255)
    x = _blend(x, _grey(x).mean((2, 3), keepdim=True), contrast)
    x = _blend(x, _grey(x), saturation)
    x = _turn_hue(x, hue)
    x = torch.where(grey > 0, _grey(x).expand_as(x), x)
    return x.round().clamp(0, 255).to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    return (x * _constants(GREY, x.device)).sum(1, keepdim=True)


def _blend(x: Tensor, towards: Tensor, factor: Tensor) -> Tensor:
    return (towards + (x - towards) * factor).clamp(0, 255)


def _turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """The hue turned by a share of the circle, value and saturation kept (HSV)."""
    top, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = top - low
    red, green, blue = x.split(1, dim=1)
    safe = spread.clamp_min(1e-6)
    hue = torch.where(
        top == red, (green - blue) / safe, torch.where(top == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    hue = (hue / 6 + turn) * 6
    place = (_constants((5.0, 3.0, 1.0), x.device) + hue) % 6  # of red, green and blue on the circle
    return top - spread * torch.minimum(place, 4 - place).clamp(0, 1)
