"""Position embeddings for images of another size and captions of another length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsclip.errors import UserError

KEPT = 20  # of Long-CLIP's rule: few captions are longer, and the positions behind are hardly trained
STRETCHES = ("linear", "long_clip")


def resize_positions(positions: Tensor, patches: int, class_tokens: int = 1) -> Tensor:
    """[c + old patches, width] -> [c + patches, width]: bicubic with antialias over the grid, as OpenCLIP does.

    class_tokens: c, which stand before the patches and stay.
    """
    old = len(positions) - class_tokens
    if old == patches:
        return positions
    old_side, side = round(old**0.5), round(patches**0.5)
    grid = positions[class_tokens:].T.reshape(1, -1, old_side, old_side)
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:class_tokens], resized[0].flatten(1).T])


def resize_text_positions(positions: Tensor, context: int, stretch: str = "linear") -> Tensor:
    """[old context, width] -> [context, width]: longer by stretching, shorter by cutting off.

    stretch: `linear` interpolates between all positions, as OpenCLIP does; `long_clip` leaves the first 20 as they are and
    stretches the others (Zhang et al. 2024, "Long-CLIP", 3.1): new position i >= 20 lies at 20 + (i - 20) / r of the old ones,
    with r = (context - 20) / (old context - 20), and those beyond the last go on as the last two do. Cut, a caption that fits
    keeps its features exactly; OpenCLIP interpolates here too, which moves every position. Raises UserError for another
    stretch, and for long_clip with fewer than 22 old positions.
    """
    if stretch not in STRETCHES:
        raise UserError(f"model.stretch is `{stretch}`; choose from {', '.join(STRETCHES)}")
    old = len(positions)
    if context <= old:
        return positions[:context]
    if stretch == "linear":
        return F.interpolate(positions.T[None], size=context, mode="linear", align_corners=False)[0].T.contiguous()
    if old < KEPT + 2:
        raise UserError(f"model.stretch=long_clip keeps {KEPT} positions, and there are {old}; use linear")
    place = KEPT + torch.arange(context - KEPT, dtype=torch.float64) * ((old - KEPT) / (context - KEPT))
    left = place.floor().long().clamp_max(old - 2)
    share = (place - left)[:, None]
    wide = positions.double()
    stretched = wide[left] * (1 - share) + wide[left + 1] * share
    return torch.cat([positions[:KEPT], stretched.to(positions.dtype)])
