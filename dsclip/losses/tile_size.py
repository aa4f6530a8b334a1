"""How large a tile of the similarity matrix is, and memory for tiles.

The size is a function of shapes and device alone: tiles are summed one after the other, and a size that followed the
free memory would change the last digits of a run that is resumed.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers in a tile; a few live at a time (the plan counts four), 2 MB and 268 MB each in float32. Measured on CPU: tiles
# that stay in the caches are as fast as larger ones. A GPU wants enough work for a kernel.
CPU_ENTRIES = 1 << 19
CUDA_ENTRIES = 1 << 26


def tile_shape(rows: int, cols: int, cells: int, entries: int | None, device: torch.device) -> tuple[int, int]:
    """(height, width) of tiles over rows × cols entries, each of which takes `cells` numbers."""
    if entries is None:
        entries = max(1, (CUDA_ENTRIES if device.type == "cuda" else CPU_ENTRIES) // cells)
    # About twice as wide as high: rows are read once a tile, and wide products run best.
    width = max(1, min(cols, int((2 * entries) ** 0.5) or 1))
    if width > 64:
        width = min(cols, -(-width // 64) * 64)
    height = max(1, min(rows, entries // width))
    return height, width


class Scratch:
    """Memory for tiles that one evaluation uses again and again.

    Freed and allocated a thousand times, tiles fragment the heap: 470 MB instead of 300 MB for N = 65,536 were seen.
    """

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, cols: int, like: Tensor) -> Tensor:
        """Uninitialised [rows, cols] of like's dtype and device; the next call with this name takes it back."""
        flat = self._flat.get(name)
        if flat is None or flat.numel() < rows * cols:
            flat = self._flat[name] = like.new_empty(rows * cols)
        return flat[: rows * cols].view(rows, cols)
