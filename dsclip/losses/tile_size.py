"""How large a tile of the similarity matrix is, as large as pays and as small as free memory asks; memory for tiles."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

SHARE_OF_FREE_MEMORY = 1 / 64  # for one tile; a few live at a time
# Measured on CPU: tiles that stay in the caches are as fast as larger ones. A GPU wants enough work for a kernel.
CPU_ENTRIES = (1 << 16, 1 << 19)
CUDA_ENTRIES = (1 << 20, 1 << 26)


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):  # counts the page cache, which gives way
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def tile_shape(rows: int, cols: int, cells: int, entries: int | None, free: int, like: Tensor) -> tuple[int, int]:
    """(height, width) of tiles over rows × cols entries, each of which takes `cells` numbers."""
    if entries is None:
        smallest, largest = CUDA_ENTRIES if like.is_cuda else CPU_ENTRIES
        affordable = int(free * SHARE_OF_FREE_MEMORY) // like.element_size()
        entries = max(1, min(max(affordable, smallest), largest) // cells)
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

    def __init__(self):
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, cols: int, like: Tensor) -> Tensor:
        """Uninitialised [rows, cols] of like's dtype and device; the next call with this name takes it back."""
        flat = self._flat.get(name)
        if flat is None or flat.numel() < rows * cols:
            flat = self._flat[name] = like.new_empty(rows * cols)
        return flat[: rows * cols].view(rows, cols)
