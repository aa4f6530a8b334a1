"""What an engine saves: how many bytes, and what there is beside its tensors, as JSON holds it. Imports no DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, NotRequired, TypedDict

from torch import nn

from dsclip.optim.average import AverageState

LAYOUTS = "layout_rank_*.json"  # of `engine.reshard`


class QueueState(TypedDict):
    """The position in the ring of queued features."""

    filled: int
    next: int


class Sharding(NamedTuple):
    """How an engine's state is divided: over how many ranks, in which ZeRO stage."""

    ranks: int
    stage: int

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks != 1)} with ZeRO-{self.stage}"


class EngineState(TypedDict):
    """step: optimizer steps done; scalars: {"log_scale" or "bias": its value and AdamW's moments}; queue: None without one.

    average: of the weights, None without one; an earlier version didn't write it.
    """

    step: int
    scalars: dict[str, dict[str, float]]
    queue: QueueState | None
    average: NotRequired[AverageState | None]


def saved_bytes(weights: Iterable[nn.Parameter], moments: int = 8) -> int:
    """About what all ranks together write of these weights: themselves, their float32 copies, and the optimizer's state.

    moments: bytes of that state for each number, AdamW's by default. Of frozen ones twice themselves: DeepSpeed's ZeRO-2 writes
    them once more than others.
    """

    def of_each(w: nn.Parameter) -> int:
        return w.element_size() + 4 + moments if w.requires_grad else 2 * w.element_size()

    return sum(getattr(w, "ds_numel", w.numel()) * of_each(w) for w in weights)
