"""What a loader worker hands over: its part of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsclip.data.batch import LoadReport


@dataclass(frozen=True, eq=False)
class Part:
    """A worker's p samples of a batch, with the fields of `Batch`.

    NumPy arrays are pickled into the queue; torch would open shared memory for each of these small tensors. Images have
    shared memory of their own: then they are the number of a slot.
    """

    images: Tensor | int
    """[v·p, 3, S, S]: those of the samples, then those of each further view."""
    tokens: NDArray[np.int64]
    sample_ids: NDArray[np.int64]
    keys: NDArray[np.int64]
    hard_tokens: NDArray[np.int64] | None
    hard_owner: NDArray[np.int64] | None
    """The rows of the part, from 0."""
    augmentation: NDArray[np.float32] | None
    texts: list[NDArray[np.int64]]
    """The tokens of each further view of the captions."""
    drawn: list[list[int]]
    """What each of the worker's streams has drawn of each data set."""
    report: LoadReport
    classes: NDArray[np.int64] | None = None
    teacher: NDArray[np.float32] | None = None
    """A teacher's features of image and caption, [p, 2, D]."""
