"""Shared memory in which the loader's workers leave images for the training process."""

from __future__ import annotations

import math
import os

import torch

from dsclip.data.reading.worker import SLOTS, Settings
from dsclip.errors import UserError


def image_slots(settings: Settings) -> torch.Tensor | None:
    """Shared memory [workers, SLOTS, v·n, 3, S, S] for images on their way to the training process; None without workers.

    Used again and again: fresh shared memory would cost two page faults, one on either side, for every 4 KB.
    """
    if not settings.data.workers:
        return None
    first, stop = settings.streams
    share = settings.quota * (stop - first) // settings.workers * settings.images_per_sample
    size = settings.image_size
    shape = (settings.workers, SLOTS, share, 3, size, size)
    free = _shared_memory_bytes()
    if free is not None and math.prod(shape) > free:
        raise UserError(
            f"rank {settings.rank}: the loader's workers need {math.prod(shape) / 1e9:.1f} GB of shared memory for images, and "
            f"/dev/shm has {free / 1e9:.1f} GB free. Start the container with a larger --shm-size, or set data.workers=0."
        )
    # Shared from the beginning: `share_memory_` would copy what nobody has written, page by page.
    shared: torch.UntypedStorage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)


def _shared_memory_bytes() -> int | None:
    try:
        status = os.statvfs("/dev/shm")
    except OSError:  # no such folder on this system
        return None
    return status.f_bavail * status.f_frsize
