"""The parts that workers hand over, put together as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsclip.data.batch import OF_TEACHER, Batch, LoadReport, State
from dsclip.data.reading.part import Part


def join(parts: Sequence[Part], views: Sequence[str], state: State, report: LoadReport) -> Batch:
    """The parts of all workers in the order of the streams, in memory that a GPU copies from.

    views: the names of further views, images before texts, as the parts hold them.
    """
    pixels = [torch.as_tensor(p.images).split(len(p.sample_ids)) for p in parts]
    images, *others = [_concatenate(list(view)) for view in zip(*pixels, strict=True)]
    others += [_joined(list(view)) for view in zip(*(p.texts for p in parts), strict=True)]
    further = dict(zip(views, others, strict=True))
    teacher = _joined_or_none([p.teacher for p in parts])
    if teacher is not None:
        taught = zip(("image", "text"), teacher.unbind(1), strict=True)
        further |= {OF_TEACHER + name: x.contiguous() for name, x in taught}
    return Batch(
        images=images,
        tokens=_joined([p.tokens for p in parts]),
        sample_ids=_joined([p.sample_ids for p in parts]),
        keys=_joined([p.keys for p in parts]),
        hard_tokens=_joined_or_none([p.hard_tokens for p in parts]),
        hard_owner=_hard_owner(parts),
        augmentation=_joined_or_none([p.augmentation for p in parts]),
        classes=_joined_or_none([p.classes for p in parts]),
        views=further,
        state=state,
        report=report,
    )


def _joined(arrays: list[np.ndarray]) -> Tensor:
    return _concatenate([torch.from_numpy(x) for x in arrays])


def _joined_or_none(arrays: list[np.ndarray | None]) -> Tensor | None:
    present = [x for x in arrays if x is not None]
    return _joined(present) if present else None


def _hard_owner(parts: Sequence[Part]) -> Tensor | None:
    """The rows of the batch that hard negatives belong to."""
    firsts = np.cumsum([0, *(len(p.sample_ids) for p in parts[:-1])])
    owners = [p.hard_owner if p.hard_owner is None else p.hard_owner + f for p, f in zip(parts, firsts, strict=True)]
    return _joined_or_none(owners)


def _concatenate(tensors: list[Tensor]) -> Tensor:
    if not torch.cuda.is_available():
        fresh = len(tensors) == 1 and not tensors[0].is_shared()  # a slot of shared memory is written again
        return tensors[0] if fresh else torch.cat(tensors)
    rows = sum(len(t) for t in tensors)
    pinned = torch.empty(rows, *tensors[0].shape[1:], dtype=tensors[0].dtype, pin_memory=True)
    return torch.cat(tensors, out=pinned)
