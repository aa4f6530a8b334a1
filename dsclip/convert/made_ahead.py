"""Weights that are made while earlier ones are written: one is put together and looked through by a thread of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from dsclip.convert.weights import Named


def made_ahead(weights: Named) -> Iterator[tuple[str, Tensor]]:
    """The weights in their order, at most two of them in memory. What making one raises is raised where it would have come."""
    coming = iter(weights)
    # Copying and writing let go of the interpreter. One thread: weights come in order, and `weights` needs no lock.
    with ThreadPoolExecutor(1, thread_name_prefix="dsclip-weights") as pool:
        following = pool.submit(next, coming, None)
        while (weight := following.result()) is not None:
            following = pool.submit(next, coming, None)
            yield weight
