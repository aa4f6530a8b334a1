"""The demo's pictures: one or two coloured shapes on a dark background, and the sentences that describe them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (225, 45, 40), "green": (50, 170, 60), "blue": (50, 90, 235), "yellow": (245, 215, 50),
    "purple": (150, 60, 190), "orange": (245, 140, 30), "white": (240, 240, 240), "cyan": (60, 210, 220),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.15, "large": 0.26}  # half the extent, as a share of the picture
POSITIONS = {
    "top left": (0.28, 0.28), "top right": (0.72, 0.28), "centre": (0.5, 0.5),
    "bottom left": (0.28, 0.72), "bottom right": (0.72, 0.72),
}  # fmt: skip
RELATIONS = {  # of the first object to the second: (first centre, second centre)
    "to the left of": ((0.27, 0.5), (0.73, 0.5)), "to the right of": ((0.73, 0.5), (0.27, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)), "below": ((0.5, 0.73), (0.5, 0.27)),
}  # fmt: skip
OPPOSITE = {"to the left of": "to the right of", "above": "below"}
OPPOSITE |= {v: k for k, v in OPPOSITE.items()}

# Two shapes of each colour, and each shape in two or three colours: training shows every colour and every shape, these
# pairs never. Telling them apart takes both the colour and the shape.
HELD_OUT = frozenset({
    ("red", "star"), ("red", "square"), ("green", "circle"), ("green", "cross"),
    ("blue", "triangle"), ("blue", "ring"), ("yellow", "cross"), ("yellow", "star"),
    ("purple", "square"), ("purple", "circle"), ("orange", "ring"), ("orange", "triangle"),
    ("white", "circle"), ("white", "star"), ("cyan", "square"), ("cyan", "cross"),
})  # fmt: skip
SUPERSAMPLING = 3


@dataclass(frozen=True)
class Shape:
    """One object of a scene."""

    colour: str
    shape: str
    size: str

    @property
    def name(self) -> str:
        """Colour and shape, which is what zero-shot classification asks for."""
        return f"{self.colour} {self.shape}"

    @property
    def full_name(self) -> str:
        return f"{self.size} {self.name}"


@dataclass(frozen=True)
class Scene:
    """One object at a position, or two in a relation (then `place` is the relation of the first to the second)."""

    objects: tuple[Shape, ...]
    place: str


def random_scene(rng: np.random.Generator, *, held_out: bool, two_objects: bool) -> Scene:
    """A scene of training combinations only, or one whose first object is a held-out combination."""
    first = _random_object(rng, held_out)
    if not two_objects:
        return Scene((first,), _pick(rng, POSITIONS))
    second = _random_object(rng, held_out)
    while second.name == first.name:
        second = _random_object(rng, held_out)
    return Scene((first, second), _pick(rng, RELATIONS))


def _random_object(rng: np.random.Generator, held_out: bool) -> Shape:
    while True:
        colour, shape = _pick(rng, COLOURS), _pick(rng, SHAPES)
        thing = Shape(colour, shape, _pick(rng, SIZES))
        if _is_held_out(thing) == held_out:
            return thing


def _pick(rng: np.random.Generator, options: Collection[str]) -> str:
    return list(options)[int(rng.integers(len(options)))]


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Several sentences that are true of the scene, in different words and detail."""
    if len(scene.objects) == 1:
        (thing,) = scene.objects
        where = "in the centre" if scene.place == "centre" else f"at the {scene.place}"
        full = [
            f"a {thing.full_name} {where}", f"{where} there is a {thing.full_name}",
            f"a picture of a {thing.full_name}, {where}", f"one {thing.shape}, {thing.colour} and {thing.size}, {where}",
        ]  # fmt: skip
        brief = [f"a {thing.name}", f"a picture of a {thing.name}", f"there is a {thing.name}"]
    else:
        first, second = scene.objects
        full = [
            f"a {first.full_name} {scene.place} a {second.full_name}",
            f"a {second.full_name} {OPPOSITE[scene.place]} a {first.full_name}",
            f"there is a {first.full_name} {scene.place} a {second.full_name}",
            f"a picture of a {second.full_name} {OPPOSITE[scene.place]} a {first.full_name}",
        ]  # fmt: skip
        brief = [f"a {first.name} and a {second.name}", f"a {second.name} and a {first.name}"]
    chosen = rng.choice(len(full), size=2, replace=False)
    return [full[i] for i in chosen] + [_pick(rng, brief)]


def swapped_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Sentences that use the scene's own words and are wrong: the two objects exchange places, colours or sizes.

    A swap never makes a combination of the other split: training captions, wrong ones too, hold no held-out pair.
    """
    if len(scene.objects) == 1:
        return []
    first, second = scene.objects
    swaps = [
        (second, first),
        (replace(first, colour=second.colour), replace(second, colour=first.colour)),
        (replace(first, size=second.size), replace(second, size=first.size)),
    ]
    split = _is_held_out(first)
    wrong = dict.fromkeys(s for s in swaps if s != (first, second) and all(_is_held_out(o) == split for o in s))
    return [captions(Scene(objects, scene.place), rng)[0] for objects in wrong]


def _is_held_out(thing: Shape) -> bool:
    return (thing.colour, thing.shape) in HELD_OUT


def draw(scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture of size × size, anti-aliased, with a little jitter of place, extent and colour."""
    large = size * SUPERSAMPLING
    grey = int(rng.integers(15, 70))
    image = Image.new("RGB", (large, large), tuple(grey + int(d) for d in rng.integers(-8, 9, 3)))
    canvas = ImageDraw.Draw(image)
    centres = [POSITIONS[scene.place]] if len(scene.objects) == 1 else RELATIONS[scene.place]
    for thing, (x, y) in zip(scene.objects, centres, strict=True):
        dx, dy = rng.uniform(-0.04, 0.04, 2)
        radius = SIZES[thing.size] * rng.uniform(0.9, 1.1) * (0.85 if len(scene.objects) == 2 else 1) * large
        fill = tuple(
            int(np.clip(c + d, 0, 255)) for c, d in zip(COLOURS[thing.colour], rng.integers(-12, 13, 3), strict=True)
        )
        _draw_shape(canvas, thing.shape, (x + dx) * large, (y + dy) * large, radius, fill)
    return image.resize((size, size), Image.Resampling.BOX)


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, ...]) -> None:
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(2, round(0.4 * r)))
    elif shape == "square":
        canvas.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=fill)
    elif shape == "triangle":
        canvas.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=fill)
    elif shape == "cross":
        for w, h in ((r, 0.33 * r), (0.33 * r, r)):
            canvas.rectangle((x - w, y - h, x + w, y + h), fill=fill)
    else:
        radii = [r * 1.1 if i % 2 == 0 else r * 0.45 for i in range(10)]
        angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
        canvas.polygon(
            [(x + q * math.cos(a), y + q * math.sin(a)) for q, a in zip(radii, angles, strict=True)], fill=fill
        )
