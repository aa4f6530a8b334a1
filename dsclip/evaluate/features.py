"""Embeds a data set over all ranks so that the result does not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsclip.losses import Group

Encoder = Callable[[Tensor], Tensor]


def encode_in_batches(
    encode: Encoder, make_batch: Callable[[int, int], Tensor], total: int, batch_size: int, group: Group
) -> Tensor:
    """Features [total, d] on the CPU of every rank, in order.

    make_batch(start, stop) gives the inputs of samples start..stop. Batch j belongs to rank j mod world size and is
    always full (the last one is padded), so every forward has the same shape and features are bit-identical for every
    number of ranks. Ranks without a batch in the last round run a dummy: under ZeRO-3 each forward is collective.
    """
    batches = -(-total // batch_size)
    parts = []
    for first in range(0, batches, group.world_size):
        index = min(first + group.rank, batches - 1)
        start, stop = index * batch_size, min(total, (index + 1) * batch_size)
        features = encode(_padded(make_batch(start, stop), batch_size)).float()
        parts.append(group.all_gather(features).cpu())
    return torch.cat(parts)[:total]


def _padded(batch: Tensor, batch_size: int) -> Tensor:
    missing = batch_size - len(batch)
    return torch.cat([batch, batch[:1].expand(missing, *batch.shape[1:])]) if missing else batch


def encode_texts(encode_text: Encoder, texts: list[str], tokenizer, context_length: int, batch_size: int, group: Group):
    """Features [len(texts), d] of captions."""
    return encode_in_batches(
        encode_text, lambda a, b: tokenizer(texts[a:b], context_length), len(texts), batch_size, group
    )


def encode_images(encode_image: Encoder, dataset, indices: list[int], batch_size: int, group: Group) -> Tensor:
    """Features [len(indices), d] of the data set's images with these indices."""
    return encode_in_batches(
        encode_image,
        lambda a, b: torch.stack([dataset[i]["image"] for i in indices[a:b]]),
        len(indices),
        batch_size,
        group,
    )
