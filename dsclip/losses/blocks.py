"""Tensors of all ranks as blocks: all ranks in one, or one rank at a time, passed round in a ring."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsclip.losses.group import Group


def blocks(tensors: list[Tensor], group: Group) -> Iterator[tuple[int, list[Tensor]]]:
    """(first rank, the tensors of that rank and those that follow in the block). Collective: iterate to the end.

    tensors: of this rank; their shapes must be those of all ranks. One block of all ranks, or with `group.in_ring` a block a
    rank, this one's first. Then the next block travels while one is in use, and its memory is the next but one's: nothing
    of a block may be kept.
    """
    if not group.in_ring or group.world_size == 1:
        yield 0, [group.all_gather(x) for x in tensors]
        return
    here, spare = [x.contiguous() for x in tensors], None
    for distance in range(group.world_size):
        origin = (group.rank - distance) % group.world_size
        if distance == group.world_size - 1:
            yield origin, here
            return
        there = spare or [torch.empty_like(x) for x in here]
        arrived = group.pass_on(here, there)
        yield origin, here
        arrived()
        here, spare = there, here if distance else None  # the first is the caller's own
