"""A drawing of lines, areas, dots and words, written as SVG, and as PNG with Pillow: figures need no plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageFont

from dsclip.files import write_whole

XY = tuple[float, float]
ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}
SHARPNESS, SMOOTHING = 2, 2  # pixels of a PNG a unit; and of the larger picture that is made small to smooth its lines
DETAIL = SHARPNESS * SMOOTHING
DASH = (6.0, 4.0)


@dataclass(frozen=True)
class _Mark:
    kind: str  # line | area | dot | text
    at: tuple[XY, ...]
    colour: str
    size: float = 1.0  # of a line its width, of a dot its radius, of text its height
    opacity: float = 1.0
    dashed: bool = False
    words: str = ""
    anchor: str = "start"


@dataclass
class Drawing:
    """Marks in units from the top left, drawn in the order in which they were added."""

    width: int
    height: int
    marks: list[_Mark] = field(default_factory=list)

    def line(self, points: Sequence[XY], colour: str, width: float = 1.5, dashed: bool = False) -> None:
        """A line through points."""
        self.marks.append(_Mark("line", tuple(points), colour, width, dashed=dashed))

    def area(self, points: Sequence[XY], colour: str, opacity: float) -> None:
        """A filled polygon without an edge."""
        self.marks.append(_Mark("area", tuple(points), colour, opacity=opacity))

    def dot(self, at: XY, colour: str, radius: float = 3.5, opacity: float = 1.0) -> None:
        """A filled circle."""
        self.marks.append(_Mark("dot", (at,), colour, radius, opacity))

    def text(self, at: XY, words: str, size: float = 12, anchor: str = "start", colour: str = "#1f2933") -> None:
        """Words whose line begins, is centred or ends at a point: anchor start, middle or end."""
        self.marks.append(_Mark("text", (at,), colour, size, words=words, anchor=anchor))

    def write(self, path: Path) -> None:
        """PATH.svg and PATH.png."""
        write_whole(path.with_suffix(".svg"), self.svg())
        self.picture().save(path.with_suffix(".png"), optimize=True)

    def svg(self) -> str:
        """The drawing as an SVG element."""
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">']
        lines.append('<rect width="100%" height="100%" fill="white"/>')
        return "\n".join([*lines, *(_element(mark) for mark in self.marks), "</svg>", ""])

    def picture(self) -> Image.Image:
        """The drawing in RGB, two pixels a unit."""
        image = Image.new("RGB", (self.width * DETAIL, self.height * DETAIL), "white")
        canvas = ImageDraw.Draw(image, "RGBA")
        for mark in self.marks:
            _paint(canvas, mark)
        return image.reduce(SMOOTHING)


def _element(mark: _Mark) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.at)
    x, y = mark.at[0]
    if mark.kind == "line":
        dash = f' stroke-dasharray="{DASH[0]:g} {DASH[1]:g}"' if mark.dashed else ""
        return f'<polyline points="{points}" fill="none" stroke="{mark.colour}" stroke-width="{mark.size:g}"{dash}/>'
    if mark.kind == "area":
        return f'<polygon points="{points}" fill="{mark.colour}" fill-opacity="{mark.opacity:g}"/>'
    if mark.kind == "dot":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{mark.size:g}" fill="{mark.colour}" fill-opacity="{mark.opacity:g}"/>'
    style = f'font-size="{mark.size:g}" text-anchor="{mark.anchor}" fill="{mark.colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(mark.words)}</text>'


def _paint(canvas: ImageDraw.ImageDraw, mark: _Mark) -> None:
    at = [(x * DETAIL, y * DETAIL) for x, y in mark.at]
    colour = (*ImageColor.getrgb(mark.colour)[:3], round(255 * mark.opacity))
    if mark.kind == "line":
        for piece in _dashes(at) if mark.dashed else [at]:
            canvas.line(piece, fill=colour, width=max(1, round(mark.size * DETAIL)), joint="curve")
    elif mark.kind == "area":
        canvas.polygon(at, fill=colour)
    elif mark.kind == "dot":
        (x, y), r = at[0], mark.size * DETAIL
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    else:
        font = ImageFont.load_default(mark.size * DETAIL)
        canvas.text(at[0], mark.words, fill=colour, font=font, anchor=ANCHORS[mark.anchor])


def _dashes(points: Sequence[XY]) -> list[list[XY]]:
    """The pieces of a line that are drawn; Pillow has no dashes."""
    pieces: list[list[XY]] = []
    drawn, left = True, DASH[0] * DETAIL
    piece = [points[0]]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        gone = 0.0
        while length - gone > left:
            gone += left
            piece.append((x0 + (x1 - x0) * gone / length, y0 + (y1 - y0) * gone / length))
            if drawn:
                pieces.append(piece)
            drawn, piece = not drawn, piece[-1:]
            left = DASH[0 if drawn else 1] * DETAIL
        left -= length - gone
        piece.append((x1, y1))
    return [*pieces, piece] if drawn else pieces
