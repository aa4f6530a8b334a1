"""Which phases there are, how long each may take, and in which order they run when time is short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Phase:
    """One process. module: its file in `phases`. deadline_s: it is ended then, with the rows it has."""

    name: str
    module: str
    deadline_s: float
    options: Mapping[str, Any] = field(default_factory=dict)


def _step(preset: str, batch: int, accept: float, stretch: float, deadline_s: float = 60) -> Phase:
    options = {"preset": preset, "batch": batch, "accept": accept, "stretch": stretch}
    return Phase(f"step {preset}", "steps", deadline_s, options)


# What decides most comes first. Samples/s of a step: accept and stretch lines of one H100.
PHASES = (
    Phase("env", "env", 30),
    Phase("exact", "exact", 120),
    _step("ViT-L-14", 256, 760, 890, 75),
    Phase("block", "block", 90),
    Phase("loss", "loss", 90),
    _step("ViT-g-14", 96, 250, 290, 90),
    Phase("memory", "memory", 90),
    Phase("peers ViT-L-14", "peers", 120, {"preset": "ViT-L-14", "batch": 256, "accept": 1.05}),
    _step("ViT-B-32", 1024, 9000, 12000),
    Phase("peers ViT-B-32", "peers", 120, {"preset": "ViT-B-32", "batch": 1024, "accept": 1.3}),
    Phase("profile", "profile", 60),
    Phase("attention", "attention", 90),
    _step("ViT-B-16", 512, 3000, 3600),
    _step("ViT-H-14", 128, 370, 430, 75),
    Phase("train", "train", 150),
    Phase("data", "data", 150),
)
# With tiny shapes all presets are one.
ONCE = ("step ViT-g-14", "peers ViT-L-14", "step ViT-B-32", "step ViT-B-16", "step ViT-H-14")
# Their times say nothing: a machine that is busy otherwise may take as long as it needs. Only what hangs is ended.
TINY_DEADLINE_S = 300.0
TINY = tuple(replace(phase, deadline_s=TINY_DEADLINE_S) for phase in PHASES if phase.name not in ONCE)
