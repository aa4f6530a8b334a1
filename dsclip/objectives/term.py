"""What a term of the objective is: from named features to a value and its exact gradient for each feature it used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dsclip.config.objective_section import TermSection
from dsclip.losses import Group, Negatives


@dataclass(frozen=True)
class TeacherFeatures:
    """What a teacher makes of this rank's samples. views: `image` and `text`, [n, D'] unit rows in float32 or wider, of its own width. log_scale: its temperature's."""

    views: Mapping[str, Tensor]
    log_scale: float


@dataclass(frozen=True)
class Features:
    """This rank's features by name, row i of each of sample i.

    views: `image`, `text`, `image_2`, …, each [n, D], unit rows; float32, or bfloat16 with `loss.wire_dtype: bf16`. Of heads
    `image.NAME`, …: unit rows of a projector likewise, cosines with prototypes and logits of classes in float32.
    log_scale []: the shared temperature. keys [n] int64: equal keys mark duplicates; None unless the loss section or a
    term asks. classes [n] int64: of each sample; None without a classifier. teacher: None where the objective has none.
    seed: the run's, and the step: all that is random in a term is a function of them, and so the same on all ranks.
    """

    views: Mapping[str, Tensor]
    log_scale: Tensor
    keys: Tensor | None = None
    classes: Tensor | None = None
    teacher: TeacherFeatures | None = None
    seed: tuple[int, int] = (0, 0)

    def __getitem__(self, name: str) -> Tensor:
        return self.views[name]


@dataclass(frozen=True)
class TermGrads:
    """value []: of the global batch, the same on every rank. d_views: gradient of that *global* value for this rank's
    features, in float32 or wider, by name; what is left out has none. d_log_scale []: for the shared temperature, summed
    over ranks; None: the term doesn't use it.
    """

    value: Tensor
    d_views: Mapping[str, Tensor]
    d_log_scale: Tensor | None = None


class Term(Protocol):
    """A term as the objective calls it. Collective."""

    def __call__(self, features: Features, *, group: Group) -> TermGrads:
        """Its value, without its weight, and its gradients."""


class TermFactory(Protocol):
    """Makes a term at the start of a run; raises UserError for settings that it can't obey."""

    def __call__(self, settings: TermSection, negatives: Negatives) -> Term:
        """settings: its element of `objective.terms`. negatives: those of the loss section."""
