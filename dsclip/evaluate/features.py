"""Features of an evaluation set, computed by all ranks together; images are decoded by the rank that embeds them."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.data.decoding.sample import BadSample
from dsclip.errors import UserError
from dsclip.losses import Group

Encoder = Callable[[Any], Tensor]
AHEAD = 2  # batches that are decoded while one is embedded
THREADS = 8  # Pillow lets go of the interpreter while it decodes and resizes
# What can be wrong with an image; travels between ranks as its place in this list.
PROBLEMS = ("undecodable image", "too many pixels", "unreadable shard", "unreadable file")
Decoded = tuple[Tensor | None, int]  # an image [3, S, S], and 0 or 1 + the place in PROBLEMS


class Tokenize(Protocol):
    """Captions in, what `encode_text` takes out: token ids; `dsclip.data`'s Tokenizer is one."""

    def __call__(self, captions: list[str], context_length: int, /) -> Any:
        """int64 [n, context_length] of n captions."""


class Store(Protocol):
    """Features that were computed before, on all ranks of a group. Collective."""

    def images(self, dataset: EvalDataset, indices: list[int], compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` returned for these images once: [n, d + 1]."""

    def texts(self, texts: list[str], compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` returned for these texts once: [n, d]."""


@dataclass(frozen=True)
class Embedder:
    """The two towers of a model as the tasks use them: on all ranks of a group, in batches of one size.

    encode_image: images [batch_size, 3, S, S] uint8 to unit features [batch_size, d]; encode_text: tokens
    [batch_size, context_length] to the same. store: where features are looked for first. embedded: told "images" or "texts" and how many
    more have gone through the model, on all ranks together. fitted: told how many of at most so many classifiers a task has fitted to
    features. Its methods are collective.
    """

    encode_image: Encoder
    encode_text: Encoder
    tokenize: Tokenize
    group: Group
    context_length: int
    batch_size: int
    store: Store | None = None
    embedded: Callable[[str, int], None] | None = None
    fitted: Callable[[int, int], None] | None = None

    def texts(self, texts: list[str]) -> Tensor:
        """Features [len(texts), d] of captions, on the CPU of every rank, in order; [0, 0] of none."""
        if not texts:
            return torch.empty(0, 0)

        def compute() -> Tensor:
            features = self._gathered("texts", self._text_rows(texts), len(texts))
            check_finite("text features", features)
            return features

        return compute() if self.store is None else self.store.texts(texts, compute)

    def _text_rows(self, texts: list[str]) -> Iterator[Tensor]:
        for start, stop in batches_of_rank(len(texts), self.batch_size, self.group):
            batch = texts[start:stop]
            whole = batch + batch[:1] * (self.batch_size - len(batch))
            yield self.encode_text(self.tokenize(whole, self.context_length)).float()

    def images(self, dataset: EvalDataset, indices: list[int]) -> tuple[Tensor, list[int]]:
        """(features [k, d], the k of these indices whose images could be decoded), the same on every rank.

        An image that can't be decoded is embedded as a black one, so that no rank waits for another; then all leave it out
        and write it down in `dataset.broken`. Raises UserError, on all ranks, when no image is left.
        """

        def compute() -> Tensor:
            rows = self._gathered("images", self._image_rows(dataset, indices), len(indices))
            check_finite("image features", rows)
            return rows

        gathered = compute() if self.store is None else self.store.images(dataset, indices, compute)
        features = gathered[:, :-1]
        problems = gathered[:, -1].long().tolist()
        if not any(problems):
            return features.contiguous(), indices
        for index, problem in zip(indices, problems, strict=True):
            if problem:
                dataset.broken[index] = PROBLEMS[problem - 1]
        whole = [row for row, problem in enumerate(problems) if not problem]
        if not whole:
            raise UserError(f"none of the {len(indices)} images can be used ({PROBLEMS[problems[0] - 1]})")
        return features[whole], [indices[row] for row in whole]

    def _image_rows(self, dataset: EvalDataset, indices: list[int]) -> Iterator[Tensor]:
        """[batch_size, d + 1] of each of this rank's batches: the features, and what was wrong with the image."""
        for images, problems in _decoded(dataset, indices, batches_of_rank(len(indices), self.batch_size, self.group)):
            features = self.encode_image(self._padded(images)).float()
            yield torch.cat([features, self._padded(problems).to(features)[:, None]], dim=1)

    def _gathered(self, kind: str, rows: Iterable[Tensor], total: int) -> Tensor:
        """The rows of all ranks' batches [batch_size, ...], in the order of what was embedded: [total, ...]."""
        parts, done = [], 0
        for part in rows:
            parts.append(self.group.all_gather(part).cpu())
            new = min(len(parts[-1]), total - done)
            done += new
            if self.embedded is not None:
                self.embedded(kind, new)
        return torch.cat(parts)[:total]

    def _padded(self, batch: Tensor) -> Tensor:
        missing = self.batch_size - len(batch)
        return torch.cat([batch, batch[:1].expand(missing, *batch.shape[1:])]) if missing else batch


def batches_of_rank(total: int, batch_size: int, group: Group) -> list[tuple[int, int]]:
    """(start, stop) of this rank's batches.

    Batch j belongs to rank j mod world size and is always full (the last one is padded), so every forward has the same
    shape and features are bit-identical for every number of ranks. Ranks without a batch in the last round run the last
    one again: under ZeRO-3 each forward is collective.
    """
    batches = -(-total // batch_size)
    numbers = (min(first + group.rank, batches - 1) for first in range(0, batches, group.world_size))
    return [(j * batch_size, min(total, (j + 1) * batch_size)) for j in numbers]


def check_finite(name: str, values: Tensor) -> None:
    """Raises UserError when a row of values [n, ...] isn't finite: no score exceeds NaN, so every answer would be right."""
    rows = values.flatten(1).isfinite().all(dim=1)
    if not rows.all():
        raise UserError(
            f"{name} are not finite ({int((~rows).sum())} of {len(rows)} rows): the model's training diverged, "
            "and there is nothing to measure"
        )


def _decoded(
    dataset: EvalDataset, indices: list[int], batches: list[tuple[int, int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images [b, 3, S, S], problems [b]: 0, or 1 + the place in PROBLEMS) of each batch, decoded ahead by threads."""
    threads = min(THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    # Decoding silences Pillow's warnings for a moment, which threads can't do one beside the other.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads, thread_name_prefix="dsclip-eval") as pool:
        waiting: deque[list[Future[Decoded]]] = deque()
        for start, stop in batches:
            waiting.append([pool.submit(_image, dataset, index) for index in indices[start:stop]])
            if len(waiting) > AHEAD:
                yield _stacked(dataset, waiting.popleft())
        while waiting:
            yield _stacked(dataset, waiting.popleft())


def _image(dataset: EvalDataset, index: int) -> Decoded:
    try:
        return dataset.image(index), 0
    except BadSample as reason:
        return None, 1 + (PROBLEMS.index(str(reason)) if str(reason) in PROBLEMS else 0)


def _stacked(dataset: EvalDataset, decoding: list[Future[Decoded]]) -> tuple[Tensor, Tensor]:
    decoded = [future.result() for future in decoding]
    images = [dataset.blank() if image is None else image for image, _ in decoded]
    return torch.stack(images), torch.tensor([problem for _, problem in decoded])
