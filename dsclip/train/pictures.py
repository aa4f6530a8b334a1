"""Pictures of what a model retrieves, for TensorBoard's image tab."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]

PAPER, INK, FAINT = (255, 255, 255), (35, 39, 47), (140, 146, 156)
RIGHT, WRONG = (32, 150, 83), (214, 218, 224)
THUMBNAIL, GAP, TEXT_WIDTH = 112, 12, 300
SHOWN_CANDIDATES = 5
# White at zero, deep blue above, rust below.
_ZERO, _POSITIVE, _NEGATIVE = np.array([247, 249, 252]), np.array([12, 64, 140]), np.array([176, 72, 22])


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def retrieval_grid(images: Pixels, captions: list[str], similarity: Floats, data: str = "", rows: int = 8) -> Pixels:
    """Captions with the images they find, best first; the caption's own image is framed in green.

    images uint8 [n, 3, H, W], captions n strings, similarity [n captions, n images], data: their name, for the title.
    Returns uint8 [H, W, 3].
    """
    rows, columns = min(rows, len(captions)), min(SHOWN_CANDIDATES, len(images))
    row_height = THUMBNAIL + 26 + GAP
    width = 2 * GAP + TEXT_WIDTH + columns * (THUMBNAIL + GAP)
    sheet = Image.new("RGB", (width, 40 + rows * row_height + GAP), PAPER)
    canvas = ImageDraw.Draw(sheet)
    canvas.text((GAP, 12), "caption", fill=FAINT, font=_font(14))
    title = f"most similar of {len(images)} images{_of(data)}; green: the caption's own"
    canvas.text((GAP + TEXT_WIDTH, 12), title, fill=FAINT, font=_font(14))
    for row in range(rows):
        top = 40 + row * row_height
        _draw_caption(canvas, captions[row], GAP, top)
        for place, candidate in enumerate(np.argsort(-similarity[row], kind="stable")[:columns]):
            left = GAP + TEXT_WIDTH + place * (THUMBNAIL + GAP)
            right = candidate == row
            canvas.rectangle(
                (left - 4, top - 4, left + THUMBNAIL + 3, top + THUMBNAIL + 3), fill=RIGHT if right else WRONG
            )
            sheet.paste(_thumbnail(images[candidate]), (left, top))
            score = f"{similarity[row, candidate]:.3f}"
            canvas.text((left, top + THUMBNAIL + 6), score, fill=RIGHT if right else FAINT, font=_font(13))
    return np.asarray(sheet)


def _of(data: str) -> str:
    """The end of a long name stays: it says whether these are training pairs."""
    return (f", {data}" if len(data) <= 42 else f", ...{data[-40:]}") if data else ""


def _draw_caption(canvas: ImageDraw.ImageDraw, caption: str, left: int, top: int) -> None:
    lines = textwrap.wrap(caption, 36) or [""]
    if len(lines) > 5:
        lines = [*lines[:4], lines[4] + " ..."]
    canvas.multiline_text((left, top + 4), "\n".join(lines), fill=INK, font=_font(16), spacing=5)


def _thumbnail(image: Pixels) -> Image.Image:
    return Image.fromarray(image.transpose(1, 2, 0)).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)


def similarity_matrix(similarity: Floats, data: str = "", limit: int = 64) -> Pixels:
    """Cosine similarity of the first `limit` captions (rows) and images (columns) as a heat map with its scale.

    A trained model shows a dark blue diagonal. data: their name, for the title. Returns uint8 [H, W, 3].
    """
    shown = np.asarray(similarity, dtype=float)[:limit, :limit]
    n = len(shown)
    cell = max(4, 512 // n)
    side, left, top = cell * n, 74, 92
    sheet = Image.new("RGB", (left + side + 110, top + side + 24), PAPER)
    canvas = ImageDraw.Draw(sheet)
    title = f"cosine similarity of {n} captions and images{_of(data)}"
    canvas.text((24, 14), title, fill=INK, font=_font(14))
    positives = f"own pairs {_number(np.diag(shown).mean())} on average"
    others = shown[~np.eye(n, dtype=bool)]
    canvas.text(
        (24, 36), f"{positives}, others {_number(others.mean())}" if n > 1 else positives, fill=FAINT, font=_font(13)
    )
    most = _limit(shown)
    heat = Image.fromarray(_colour(shown / most)).resize((side, side), Image.Resampling.NEAREST)
    sheet.paste(heat, (left, top))
    canvas.rectangle((left - 1, top - 1, left + side, top + side), outline=WRONG)
    _draw_axes(sheet, canvas, left, top, n, cell)
    _draw_scale(sheet, canvas, left + side + 26, top, side, most)
    return np.asarray(sheet)


def _limit(values: Floats) -> float:
    """Where the scale ends on both sides of zero: the largest value in tenths, rounded up."""
    return float(max(0.1, np.ceil(np.abs(values).max() * 10 - 1e-9) / 10))


def _number(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # no -0.00


def _draw_axes(sheet: Image.Image, canvas: ImageDraw.ImageDraw, left: int, top: int, n: int, cell: int) -> None:
    """Numbers from 1 at every eighth row and column, and what they number."""
    canvas.text((left, top - 36), "image", fill=INK, font=_font(13))
    label = Image.new("RGB", (60, 18), PAPER)
    ImageDraw.Draw(label).text((0, 1), "caption", fill=INK, font=_font(13))
    label = label.rotate(90, expand=True)
    sheet.paste(label, (left - 54, top))
    for number in sorted({1, *range(8, n + 1, 8), *([n] if n < 8 else [])}):
        middle = (number - 1) * cell + cell // 2
        canvas.text((left + middle, top - 6), str(number), fill=INK, font=_font(11), anchor="mb")
        canvas.text((left - 6, top + middle), str(number), fill=INK, font=_font(11), anchor="rm")
        canvas.line((left + middle, top - 4, left + middle, top - 2), fill=FAINT)
        canvas.line((left - 4, top + middle, left - 2, top + middle), fill=FAINT)


def _colour(shares: Floats) -> Pixels:
    """uint8 [..., 3] of values from −1 to 1."""
    shares = np.clip(shares, -1, 1)[..., None]
    ends = np.where(shares < 0, _NEGATIVE, _POSITIVE)
    return np.asarray((_ZERO + np.abs(shares) * (ends - _ZERO)).round(), dtype=np.uint8)


def _draw_scale(sheet: Image.Image, canvas: ImageDraw.ImageDraw, left: int, top: int, height: int, most: float) -> None:
    ramp = _colour(np.linspace(1, -1, height)[:, None])
    sheet.paste(Image.fromarray(ramp).resize((16, height), Image.Resampling.NEAREST), (left, top))
    canvas.rectangle((left - 1, top - 1, left + 16, top + height), outline=WRONG)
    for share in (1.0, 0.5, 0.0, -0.5, -1.0):
        place = (left + 24, top + (1 - share) / 2 * height)
        canvas.text(place, _number(share * most), fill=INK, font=_font(12), anchor="lm")
