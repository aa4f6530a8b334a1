"""What an engine saves beside its tensors, as JSON holds it. Imports no DeepSpeed."""

from __future__ import annotations

from typing import TypedDict


class QueueState(TypedDict):
    """The position in the ring of queued features."""

    filled: int
    next: int


class EngineState(TypedDict):
    """step: optimizer steps done; scalars: {"log_scale" or "bias": its value and AdamW's moments}; queue: None without one."""

    step: int
    scalars: dict[str, dict[str, float]]
    queue: QueueState | None
