"""When a run saves, and what training waits for."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsclip.checkpoint import CheckpointStore, NotSaved
from dsclip.config import Recipe
from dsclip.distributed import Collectives
from dsclip.train.watch import Watch

if TYPE_CHECKING:  # importing it takes DeepSpeed's seconds
    from dsclip.engine.contrastive import ContrastiveEngine


class Saving:
    """The checkpoints of a training loop. Every method is collective."""

    def __init__(self, recipe: Recipe, engine: ContrastiveEngine, store: CheckpointStore, watch: Watch):
        self._recipe, self._engine, self._store, self._watch = asdict(recipe), engine, store, watch
        self._every = recipe.train.save_every
        self._clock = SaveClock(recipe.train.save_minutes, recipe.train.log_every, engine.group)
        self._stood_s = 0.0  # that training waited for the checkpoint under way

    def found(self, step: int) -> Path | None:
        """The run's own checkpoint of a step, if it has one."""
        return self._store.find(step)

    def due(self, step: int) -> bool:
        """Whether the step is to be saved on the way."""
        by_steps = self._every is not None and step % self._every == 0
        return by_steps or self._clock.due(step)

    def save(self, data_state: dict[str, Any] | None, guard: dict[str, Any]) -> Path:
        """Saves this step, and waits until it is there. guard: the guard's state, kept with the counts. Raises NotSaved."""
        self._watch.heart.beat("saving", longer=True)
        self.wait()
        started = time.monotonic()
        folder = self._store.save(self._engine, *self._what(data_state, guard))
        self._saved(self._engine.step, folder, time.monotonic() - started)
        return folder

    def save_on_the_way(self, data_state: dict[str, Any] | None, guard: dict[str, Any]) -> None:
        """The same, in the background if there is one. What can't be saved is said, and the run goes on."""
        try:
            if self._store.in_background:
                self._copy(data_state, guard)
            else:
                self.save(data_state, guard)
        except NotSaved as error:
            self._not_saved(self._engine.step, error)

    def look(self) -> None:
        """After a step that isn't saved: what has been written meanwhile becomes a checkpoint."""
        self._finish(wait=False)

    def wait(self) -> None:
        """Returns when nothing is under way any more."""
        if (step := self._store.under_way) is not None:
            self._watch.message(
                f"step {self._engine.step}: waiting for the checkpoint of step {step}, which is being written"
            )
            self._finish(wait=True)

    def _copy(self, data_state: dict[str, Any] | None, guard: dict[str, Any]) -> None:
        self._watch.heart.beat("saving", longer=True)
        self.wait()
        started = time.monotonic()
        self._store.copy(self._engine, *self._what(data_state, guard))
        self._stood_s = time.monotonic() - started

    def _finish(self, *, wait: bool) -> None:
        """What training waits for a checkpoint is part of its cost, as is the copy."""
        if (step := self._store.under_way) is None:
            return
        started = time.monotonic()
        try:
            found = self._store.finish(self._engine.group, wait=wait)
        except NotSaved as error:
            self._not_saved(step, error)
            return
        self._stood_s += time.monotonic() - started
        if found is not None:
            folder, writing_s = found
            self._saved(step, folder, self._stood_s, writing_s)

    def _what(
        self, data_state: dict[str, Any] | None, guard: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """What a checkpoint holds beside the engine's state."""
        if data_state is None:
            raise RuntimeError(f"step {self._engine.step}: the loader's batches don't say their position in the data")
        self._clock.restart()
        return data_state, self._recipe, {**self._watch.counted(), "guard": guard}

    def _saved(self, step: int, folder: Path, stood_s: float, writing_s: float | None = None) -> None:
        """stood_s: that training stood still for it; writing_s: that it was written in the background."""
        writing = {} if writing_s is None else {"write_seconds": round(writing_s, 3)}
        aside = "" if writing_s is None else f", written in {writing_s:.1f} s while training went on"
        self._watch.event(step, f"step {step}: saved {folder}{aside}", {"save_seconds": round(stood_s, 3), **writing})

    def _not_saved(self, step: int, error: NotSaved) -> None:
        self._watch.message(f"step {step}: NOT saved, and the run goes on: {error}")


class SaveClock:
    """Whether `minutes` have passed since the last checkpoint, by rank 0's clock; looked at every `every` steps."""

    def __init__(self, minutes: float | None, every: int, group: Collectives):
        self._minutes, self._every, self._group = minutes, every, group
        self.restart()

    def restart(self) -> None:
        """A checkpoint was saved."""
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """Collective at every `every`-th step."""
        if self._minutes is None or step % self._every:
            return False
        return self._group.broadcast_object(time.monotonic() - self._since >= 60 * self._minutes)
