"""Features of an evaluation set, computed by all ranks together; images are decoded by the rank that embeds them."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from dsclip.data.decoding.sample import BadSample
from dsclip.errors import UserError
from dsclip.losses import Group

Encoder = Callable[[Tensor], Tensor]
AHEAD = 2  # batches that are decoded while one is embedded
THREADS = 8  # Pillow lets go of the interpreter while it decodes and resizes
# What can be wrong with an image; travels between ranks as its place in this list.
PROBLEMS = ("undecodable image", "too many pixels", "unreadable shard")


def encode_texts(encode_text: Encoder, texts: list[str], tokenizer, context_length: int, batch_size: int, group: Group):
    """Features [len(texts), d] of captions, on the CPU of every rank, in order. Collective."""
    rows = (
        encode_text(_padded(tokenizer(texts[start:stop], context_length), batch_size)).float()
        for start, stop in own_batches(len(texts), batch_size, group)
    )
    return _gathered(rows, len(texts), group)


def encode_images(
    encode_image: Encoder, dataset, indices: list[int], batch_size: int, group: Group
) -> tuple[Tensor, list[int]]:
    """(features [k, d], the k of these indices whose images could be decoded), the same on every rank. Collective.

    An image that can't be decoded is embedded as a black one, so that no rank waits for another; then all leave it out and
    write it down in `dataset.broken`. Raises UserError, on all ranks, when no image is left.
    """

    def rows() -> Iterator[Tensor]:
        for images, problems in _decoded(dataset, indices, own_batches(len(indices), batch_size, group)):
            features = encode_image(_padded(images, batch_size)).float()
            yield torch.cat([features, _padded(problems, batch_size).to(features)[:, None]], dim=1)

    found = _gathered(rows(), len(indices), group)
    features, problems = found[:, :-1], found[:, -1].long().tolist()
    if not any(problems):
        return features.contiguous(), indices
    for index, problem in zip(indices, problems, strict=True):
        if problem:
            dataset.broken[index] = PROBLEMS[problem - 1]
    whole = [row for row, problem in enumerate(problems) if not problem]
    if not whole:
        raise UserError(f"none of the {len(indices)} images can be used ({PROBLEMS[problems[0] - 1]})")
    return features[whole], [indices[row] for row in whole]


def own_batches(total: int, batch_size: int, group: Group) -> list[tuple[int, int]]:
    """(start, stop) of this rank's batches.

    Batch j belongs to rank j mod world size and is always full (the last one is padded), so every forward has the same
    shape and features are bit-identical for every number of ranks. Ranks without a batch in the last round run the last
    one again: under ZeRO-3 each forward is collective.
    """
    batches = -(-total // batch_size)
    own = (min(first + group.rank, batches - 1) for first in range(0, batches, group.world_size))
    return [(j * batch_size, min(total, (j + 1) * batch_size)) for j in own]


def _gathered(rows: Iterable[Tensor], total: int, group: Group) -> Tensor:
    found = torch.cat([group.all_gather(part).cpu() for part in rows])[:total]
    if not found.isfinite().all():  # comparisons with NaN would make every caption the right one
        raise UserError(
            "the model gives features that are not finite: its training diverged, and there is nothing to measure"
        )
    return found


def _padded(batch: Tensor, batch_size: int) -> Tensor:
    missing = batch_size - len(batch)
    return torch.cat([batch, batch[:1].expand(missing, *batch.shape[1:])]) if missing else batch


def _decoded(dataset, indices: list[int], batches: list[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(images [b, 3, S, S], problems [b]: 0, or 1 + the place in PROBLEMS) of each batch, decoded ahead by threads."""
    threads = min(THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    # Decoding silences Pillow's warnings for a moment, which threads can't do one beside the other.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads, thread_name_prefix="dsclip-eval") as pool:
        waiting: deque[list[Future]] = deque()
        for start, stop in batches:
            waiting.append([pool.submit(_image, dataset, index) for index in indices[start:stop]])
            if len(waiting) > AHEAD:
                yield _stacked(dataset, waiting.popleft())
        while waiting:
            yield _stacked(dataset, waiting.popleft())


def _image(dataset, index: int) -> tuple[Tensor | None, int]:
    try:
        return dataset[index]["image"], 0
    except BadSample as reason:
        return None, 1 + (PROBLEMS.index(str(reason)) if str(reason) in PROBLEMS else 0)


def _stacked(dataset, decoding: list[Future]) -> tuple[Tensor, Tensor]:
    found = [future.result() for future in decoding]
    images = [dataset.blank() if image is None else image for image, _ in found]
    return torch.stack(images), torch.tensor([problem for _, problem in found])
