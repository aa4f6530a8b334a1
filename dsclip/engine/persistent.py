"""What of an engine a checkpoint holds, written and read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed

from dsclip.distributed import Collectives
from dsclip.engine.build import saving_through
from dsclip.engine.consolidate import DEEPSPEED_TAG
from dsclip.engine.feature_queue import FeatureQueue
from dsclip.engine.finite import check_weights
from dsclip.engine.loss_scalars import LossScalars
from dsclip.engine.momentum import MomentumEncoder
from dsclip.engine.reshard import load_resharded, save_layout
from dsclip.engine.state import EngineState, Sharding, saved_bytes
from dsclip.errors import UserError
from dsclip.optim.average import WeightAverage
from dsclip.optim.flat import FlatVector
from dsclip.optim.groups import restore_settings
from dsclip.plan.optimizer_state import STATE
from dsclip.saving import Files


@dataclass(frozen=True)
class Persistent:
    """The parts beside DeepSpeed's. settings: of the optimizer's groups, which are the recipe's and no checkpoint's."""

    group: Collectives
    vectors: list[FlatVector]
    settings: list[dict[str, Any]]
    scalars: LossScalars
    queue: FeatureQueue | None
    momentum: MomentumEncoder | None
    average: WeightAverage | None

    def bytes_to_save(self, engine: deepspeed.DeepSpeedEngine, optimizer: str) -> int:
        """About what `save` writes, on all ranks together."""
        extra = 0 if self.queue is None else self.queue.bytes
        for of_each_rank in (self.momentum, self.average):
            extra += 0 if of_each_rank is None else of_each_rank.bytes * self.group.world_size
        return saved_bytes(engine.module.parameters(), STATE[optimizer]) + extra

    def save(self, engine: deepspeed.DeepSpeedEngine, folder: Path, files: Files, step: int) -> EngineState:
        """Writes the sharded weights and optimizer and the other tensors; returns the rest. Collective.

        Raises UserError for weights that are not finite. What can't be written is noted by `files`.
        """
        scalars = [x for x in (self.scalars.log_scale, self.scalars.bias) if x is not None]
        check_weights([*engine.module.parameters(), *scalars], self.group, engine.device, step)
        with saving_through(engine, files):
            engine.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, save_latest=False)
        rank = self.group.rank
        save_layout(files, folder, self.vectors, rank)
        if self.queue is not None and rank == 0:
            self.queue.save(files, folder)
        if self.momentum is not None:
            self.momentum.save(files, folder, rank)
        queue = None if self.queue is None else self.queue.state()
        average = None if self.average is None else self.average.save(files, folder, rank)
        return {"step": step, "scalars": self.scalars.state(), "queue": queue, "average": average}

    def load(
        self, engine: deepspeed.DeepSpeedEngine, folder: Path, state: EngineState, written_by: Sharding | None
    ) -> None:
        """Reads what `save` wrote. Collective. written_by: another division of the state than this engine's, if it was one."""
        if written_by is None:
            path, _ = engine.load_checkpoint(str(folder), tag=DEEPSPEED_TAG)
            if path is None:
                raise UserError(f"DeepSpeed found no checkpoint in {folder}")
            restore_settings(engine.optimizer, self.settings)
        else:
            load_resharded(engine.optimizer, engine.module, self.vectors, folder)
        self.scalars.load_state(state["scalars"])
        if self.queue is not None:
            self.queue.load(folder, state["queue"])
        if self.momentum is not None:
            self.momentum.load(folder, self.group.rank, written_by)
        if self.average is not None:
            self.average.resume(folder, state.get("average"))
