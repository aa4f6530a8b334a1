"""The optimizer of the towers, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsclip.config.schema import OptimSection
from dsclip.model import Clip
from dsclip.optim.adamw import adamw
from dsclip.optim.adamw_bf16 import AdamWBf16
from dsclip.optim.average import WeightAverage
from dsclip.optim.flat import FlatVector
from dsclip.optim.groups import parameter_groups
from dsclip.optim.lamb import Lamb
from dsclip.optim.lion import Lion
from dsclip.optim.muon import Muon
from dsclip.optim.optimizer import FlatOptimizer
from dsclip.optim.stable_adamw import StableAdamW

OPTIMIZERS: dict[str, type[FlatOptimizer]] = {
    "adamw_bf16": AdamWBf16, "lamb": Lamb, "lion": Lion, "muon": Muon, "stable_adamw": StableAdamW,
}  # fmt: skip


def build_optimizer(model: Clip, optim: OptimSection) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` says, with its parameter groups, to be given to DeepSpeed. Raises UserError for a rule without use."""
    groups = parameter_groups(model, optim)
    if optim.name == "adamw":
        return adamw(groups, optim)
    return OPTIMIZERS[optim.name](groups, optim)


def optimizer_report(engine: Any) -> dict[str, Tensor]:
    """What an optimizer of dsclip's says of its last step. engine: DeepSpeed's."""
    optimizer = engine.optimizer.optimizer
    return optimizer.report() if isinstance(optimizer, FlatOptimizer) else {}


def weight_average(
    vectors: list[FlatVector], optim: OptimSection, scalars: Mapping[str, Tensor]
) -> WeightAverage | None:
    """The moving average that `optim.ema` asks for."""
    return None if optim.ema is None else WeightAverage(vectors, scalars, optim.ema)


def attach(zero: Any, vectors: list[FlatVector]) -> None:
    """Tells an optimizer of dsclip's where tensors lie, now that DeepSpeed has it. zero: DeepSpeed's."""
    if isinstance(zero.optimizer, FlatOptimizer):
        zero.optimizer.attach(vectors)
