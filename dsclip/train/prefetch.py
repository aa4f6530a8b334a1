"""Batches on the device before they are asked for: copied and augmented beside the step that is running."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsclip.data.augment import augment


def on_device(batches: Iterator[dict], device: torch.device) -> Iterator[dict]:
    """The same batches with their tensors on `device` and their images augmented.

    On a GPU the next batch is copied from pinned memory on a stream of its own while the current one trains. Positions
    stay with their batches.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _augmented(batch)
        return
    side = torch.cuda.Stream(device)
    ahead = None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
            following = (_augmented(copied), batch)  # the pinned memory lives as long as its copy
        if ahead is not None:
            yield _ready(ahead[0], side)
        ahead = following


def _augmented(batch: dict) -> dict:
    numbers = batch.pop("augmentation", None)
    return batch if numbers is None else batch | {"images": augment(batch["images"], numbers)}


def _ready(batch: dict, side: torch.cuda.Stream) -> dict:
    """The batch for the main stream, which waits for its copy and keeps its memory from the side stream."""
    main = torch.cuda.current_stream()
    main.wait_stream(side)
    for value in batch.values():
        if torch.is_tensor(value):
            value.record_stream(main)
    return batch
