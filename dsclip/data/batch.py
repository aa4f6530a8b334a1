"""A rank's share of a global batch, from the loader to the engine, and what people are told of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

OF_TEACHER = "teacher_"  # before `image` and `text` in the names of a teacher's features among a batch's views
State = dict[str, Any]  # a position in the data, ready for JSON; its loader knows what is in it


@dataclass(frozen=True)
class LoadReport:
    """How a batch was made: for people alone, nothing of it enters a step."""

    captions: list[str] = field(default_factory=list)
    """Of the n samples, as they were tokenized."""
    read: int = 0
    """Samples read for this batch, those that could not be used included."""
    bad: dict[str, int] = field(default_factory=dict)
    """Samples skipped, by reason."""
    journal: list[dict[str, str]] = field(default_factory=list)
    """Shards that failed: {"shard", "what", "detail"}."""
    seconds: float = 0.0
    """Of all workers."""
    waited: float = 0.0
    """Of these, for bytes of remote shards."""
    slow_decoded: int = 0
    """JPEGs that only Pillow could read."""
    queue_depth: int | None = None
    """Parts that waited to be taken; None where torch doesn't tell."""
    epoch: float = 0.0
    """Passes over the data so far."""


def summed(reports: Sequence[LoadReport]) -> LoadReport:
    """One report of the parts of a batch, in their order."""
    return LoadReport(
        captions=[caption for r in reports for caption in r.captions],
        read=sum(r.read for r in reports),
        bad=dict(sum((Counter(r.bad) for r in reports), Counter())),
        journal=[entry for r in reports for entry in r.journal],
        seconds=sum(r.seconds for r in reports),
        waited=sum(r.waited for r in reports),
        slow_decoded=sum(r.slow_decoded for r in reports),
    )


@dataclass(frozen=True, eq=False)
class Batch:
    """n samples: a rank's share of a global batch. One made by hand needs images, tokens and sample ids."""

    images: Tensor
    """uint8 [n, 3, S, S], or floats that are normalised already."""
    tokens: Tensor
    """int64 [n, L]."""
    sample_ids: Tensor
    """int64 [n], the same for a sample in every epoch: patch dropout depends on it."""
    keys: Tensor | None = None
    """int64 [n], equal for duplicates; for losses that treat these apart."""
    classes: Tensor | None = None
    """int64 [n], the number of each sample's class; for terms on a classifier."""
    hard_tokens: Tensor | None = None
    """int64 [m, L]: the hard negatives of all samples, m in all."""
    hard_owner: Tensor | None = None
    """int64 [m]: the row of the sample that each hard negative belongs to."""
    augmentation: Tensor | None = None
    """float32 [n, 6·v]: flips and colours still to be applied to the images and each further view, see `decoding.augment`."""
    views: dict[str, Tensor] = field(default_factory=dict)
    """Further views of the same samples by name: `image_2` as images, `text_2` as tokens, …; for terms of the objective.
    `teacher_image` and `teacher_text`: a teacher's unit features, float32 [n, D'] each."""
    state: State | None = None
    """The position in the data after this batch; None for batches that no loader made."""
    report: LoadReport = field(default_factory=LoadReport)

    def __len__(self) -> int:
        return len(self.images)

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name, views among them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)} | self.views
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> Batch:
        """The same batch with its pixels on a device; copies from pinned memory don't wait.

        Tokens, ids, keys and numbers of augmentation stay in host memory: who reads lengths, or which images change, from a
        GPU waits for it.
        """
        return self._with({name: x.to(device, non_blocking=True) for name, x in self.pixels().items()})

    def pixels(self) -> dict[str, Tensor]:
        """The tensors that `to` moves."""
        names = {"images", *(name for name in self.views if name.startswith("image"))}
        return {name: x for name, x in self.tensors().items() if name in names}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return self._with({name: change(x) for name, x in self.tensors().items()})

    def _with(self, changed: dict[str, Tensor]) -> Batch:
        """The same batch with other tensors, named as by `tensors`."""
        views = {name: changed.get(name, x) for name, x in self.views.items()}
        others: dict[str, Any] = {name: x for name, x in changed.items() if name not in views}
        return replace(self, **others, views=views)

    def rows(self, start: int, stop: int) -> Batch:
        """The samples from `start` to `stop` with their hard negatives, whose owners count from `start`."""
        hard_tokens, hard_owner = self.hard_tokens, self.hard_owner
        if hard_tokens is not None and hard_owner is not None:
            chosen = (hard_owner >= start) & (hard_owner < stop)
            hard_tokens, hard_owner = hard_tokens[chosen], hard_owner[chosen] - start
        samples = replace(self, hard_tokens=None, hard_owner=None)._map(lambda x: x[start:stop])
        return replace(samples, hard_tokens=hard_tokens, hard_owner=hard_owner)
