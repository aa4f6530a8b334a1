"""A corruption by name and severity, as it is said on a command line and done to a decoded picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dsclip.data.corruptions import blurs, pixels
from dsclip.data.corruptions.pixels import Pixels, Random, to_picture, to_pixels
from dsclip.data.decoding.transforms import resized_and_cropped
from dsclip.errors import UserError, did_you_mean

SIZE = 224  # pixels a side, for which the paper's severities were chosen
SEVERITIES = (1, 2, 3, 4, 5)
ALL = "all"
CORRUPTIONS: dict[str, Callable[[Pixels, int, Random], Pixels]] = {
    of.__name__: of
    for of in (
        pixels.gaussian_noise, pixels.shot_noise, pixels.impulse_noise, blurs.defocus_blur, blurs.motion_blur, blurs.zoom_blur,
        pixels.fog, pixels.brightness, pixels.contrast, blurs.elastic_transform, pixels.pixelate, pixels.jpeg_compression,
        pixels.speckle_noise, blurs.gaussian_blur, pixels.saturate,
    )
}  # fmt: skip
EXTRA = ("speckle_noise", "gaussian_blur", "saturate")  # ImageNet-C's extra set, for validation: no part of `all`


@dataclass(frozen=True)
class Corruption:
    """What becomes of a picture before the model's preprocessing. severity: 0 (none) to 5; seed: of its random numbers."""

    name: str
    severity: int
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.severity}"

    def __call__(self, picture: Image.Image, number: int) -> Image.Image:
        """RGB [224, 224] of an RGB picture of any size, which is sample `number` of its set.

        The shorter side becomes 224 and the centre is cropped as CLIP does, then the picture is corrupted. The same
        numbers give the same picture, whoever asks and whatever was asked before.
        """
        picture = resized_and_cropped(picture, SIZE)
        if self.severity == 0:
            return picture
        random = np.random.default_rng([self.seed, number, self.severity, *self.name.encode()])
        return to_picture(CORRUPTIONS[self.name](to_pixels(picture), self.severity, random))


def parse_corruptions(words: Sequence[str]) -> tuple[Corruption, ...]:
    """Of NAME or NAME:SEVERITY, in order; without a severity all five; NAME may be `all`. Raises UserError for others and for repetitions."""
    found: list[Corruption] = []
    for word in words:
        name, _, severity = str(word).partition(":")
        if name != ALL and name not in CORRUPTIONS:
            raise UserError(
                f"there is no corruption {name!r}: give one of {', '.join(CORRUPTIONS)}, or {ALL}."
                f"{did_you_mean(name, [*CORRUPTIONS, ALL])}"
            )
        if ":" in str(word) and severity not in ("0", *map(str, SEVERITIES)):
            raise UserError(f"corruption {word}: a severity is a number from 1 to 5, or 0 for none")
        names = [n for n in CORRUPTIONS if n not in EXTRA] if name == ALL else [name]
        found += [Corruption(n, s) for n in names for s in ([int(severity)] if severity else SEVERITIES)]
    if repeated := next((c for c in found if found.count(c) > 1), None):
        raise UserError(f"corruption {repeated} is asked for twice")
    return tuple(found)
