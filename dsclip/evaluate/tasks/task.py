"""What a task is: the images and texts that it needs embedded, and what it measures of their features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.evaluate.results.result import Measured
from dsclip.files import sha256

Words = str | list[str] | None  # a file of lines, the lines, or those of the shards' manifest


@dataclass(frozen=True)
class Options:
    """What a user says of a task; each reads what `TaskKind.reads` names.

    train, validation: sets of probes. shots: training samples a class, () for all; seeds: how many draws of them. solver: a name in
    `logistic.FITS`. neighbours: of kNN. cache_weight, cache_sharpness: of a cache's votes, None: as the task's paper has them. logit_scale: the model's, as a factor, for its confidence; None: none is measured.
    brief: only what curves of a training show.
    """

    classnames: Words = None
    templates: Words = None
    train: EvalDataset | None = None
    validation: EvalDataset | None = None
    shots: tuple[int, ...] = ()
    seeds: int = 3
    solver: str = "lbfgs"
    neighbours: int = 20
    cache_weight: float | None = None
    cache_sharpness: float | None = None
    logit_scale: float | None = None
    brief: bool = False


DEFAULTS = Options()


class Images(NamedTuple):
    """Images of a set by their numbers."""

    dataset: EvalDataset
    indices: list[int]


class Embedded(NamedTuple):
    """Features [k, d] of the k images that could be decoded, and their numbers in the set."""

    features: Tensor
    indices: list[int]


def lines_sha256(lines: Sequence[str]) -> str:
    """Of prompts and names, as if each were a line."""
    return sha256("".join(f"{line}\n" for line in lines).encode())


class Task(Protocol):
    """A task on its set. Building it checks that the set has what it needs; whoever embeds may embed for several at once."""

    @property
    def images(self) -> Sequence[Images]:
        """What it needs embedded: one entry a set."""

    @property
    def texts(self) -> Sequence[str]:
        """What else it needs embedded; also captions of images that turn out to be broken."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """What one must know to measure the same again, beyond model and set, as JSON: hashes of prompts, settings."""

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """The result of the features of `images`, entry by entry, and of `texts` [m, d]. Not collective.

        Units of the result are numbers of the set. Raises UserError for features that are not finite.
        """


@runtime_checkable
class Fitting(Protocol):
    """A task whose measuring fits classifiers, which may take minutes: it says after each how many of at most so many there are."""

    fitted: Callable[[int, int], None]


@dataclass(frozen=True)
class TaskKind:
    """A task by name. prepare: the task on a set, UserError when the set lacks what it needs; reads: its fields of Options.

    reads_labels: of its training set, which then may have no images of the test set.
    """

    name: str
    prepare: Callable[[EvalDataset, Options], Task]
    reads: tuple[str, ...] = ()
    reads_labels: bool = True
