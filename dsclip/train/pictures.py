"""Pictures of what a model retrieves, for TensorBoard's image tab."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (255, 255, 255), (35, 39, 47), (140, 146, 156)
RIGHT, WRONG = (32, 150, 83), (214, 218, 224)
THUMBNAIL, GAP, TEXT_WIDTH = 112, 12, 300
SHOWN_CANDIDATES = 5
# From white to deep blue; similarities below zero stay white.
_LOW, _HIGH = np.array([247, 249, 252]), np.array([12, 64, 140])


def _font(size: int):
    return ImageFont.load_default(size=size)


def retrieval_grid(images: np.ndarray, captions: list[str], similarity: np.ndarray, rows: int = 8) -> np.ndarray:
    """Captions with the images they find, best first; the caption's own image is framed in green.

    images uint8 [n, 3, H, W], captions n strings, similarity [n captions, n images]. Returns uint8 [H, W, 3].
    """
    rows, columns = min(rows, len(captions)), min(SHOWN_CANDIDATES, len(images))
    row_height = THUMBNAIL + 26 + GAP
    width = 2 * GAP + TEXT_WIDTH + columns * (THUMBNAIL + GAP)
    sheet = Image.new("RGB", (width, 40 + rows * row_height + GAP), PAPER)
    canvas = ImageDraw.Draw(sheet)
    canvas.text((GAP, 12), "caption", fill=FAINT, font=_font(14))
    canvas.text((GAP + TEXT_WIDTH, 12), "most similar images; green: the caption's own", fill=FAINT, font=_font(14))
    for row in range(rows):
        top = 40 + row * row_height
        _draw_caption(canvas, captions[row], GAP, top)
        for place, candidate in enumerate(np.argsort(-similarity[row], kind="stable")[:columns]):
            left = GAP + TEXT_WIDTH + place * (THUMBNAIL + GAP)
            own = candidate == row
            canvas.rectangle(
                (left - 4, top - 4, left + THUMBNAIL + 3, top + THUMBNAIL + 3), fill=RIGHT if own else WRONG
            )
            sheet.paste(_thumbnail(images[candidate]), (left, top))
            score = f"{similarity[row, candidate]:.3f}"
            canvas.text((left, top + THUMBNAIL + 6), score, fill=RIGHT if own else FAINT, font=_font(13))
    return np.asarray(sheet)


def _draw_caption(canvas, caption: str, left: int, top: int) -> None:
    lines = textwrap.wrap(caption, 36) or [""]
    if len(lines) > 5:
        lines = [*lines[:4], lines[4] + " ..."]
    canvas.multiline_text((left, top + 4), "\n".join(lines), fill=INK, font=_font(16), spacing=5)


def _thumbnail(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image.transpose(1, 2, 0)).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)


def similarity_matrix(similarity: np.ndarray, limit: int = 64) -> np.ndarray:
    """Cosine similarity of the first `limit` captions (rows) and images (columns) as a heat map with its scale.

    A trained model shows a dark diagonal. Returns uint8 [H, W, 3].
    """
    shown = np.asarray(similarity, dtype=float)[:limit, :limit]
    n = len(shown)
    cell = max(4, 512 // n)
    side, margin = cell * n, 44
    sheet = Image.new("RGB", (side + 2 * margin + 70, side + 2 * margin), PAPER)
    canvas = ImageDraw.Draw(sheet)
    heat = Image.fromarray(_colour(shown)).resize((side, side), Image.Resampling.NEAREST)
    sheet.paste(heat, (margin, margin))
    canvas.rectangle((margin - 1, margin - 1, margin + side, margin + side), outline=WRONG)
    canvas.text((margin, margin - 24), f"images 1 to {n}", fill=INK, font=_font(14))
    label = Image.new("RGB", (side, 20), PAPER)
    ImageDraw.Draw(label).text((0, 2), f"captions 1 to {n}", fill=INK, font=_font(14))
    sheet.paste(label.rotate(90, expand=True), (margin - 26, margin))
    _draw_scale(sheet, canvas, margin + side + 24, margin, side)
    return np.asarray(sheet)


def _colour(values: np.ndarray) -> np.ndarray:
    share = np.clip(values, 0, 1)[..., None]
    return (_LOW + share * (_HIGH - _LOW)).round().astype(np.uint8)


def _draw_scale(sheet, canvas, left: int, top: int, height: int) -> None:
    ramp = _colour(np.linspace(1, 0, height)[:, None])
    sheet.paste(Image.fromarray(ramp).resize((16, height), Image.Resampling.NEAREST), (left, top))
    for value in (1.0, 0.5, 0.0):
        canvas.text((left + 22, top + (1 - value) * (height - 12)), f"{value:.1f}", fill=INK, font=_font(13))
