"""The checkpoints of one run: written aside and renamed when complete, the newest found again, old ones removed.

Between the steps, or by other processes while training goes on: the files and the moment in which they become a checkpoint are the same.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsclip.checkpoint.lineage import Lineage, complete_checkpoints, step_of
from dsclip.checkpoint.manifest import LaterRunState, write_manifest
from dsclip.distributed import Collectives
from dsclip.errors import RunFailed, UserError
from dsclip.files import on_disk
from dsclip.saving import Background, Files, Problem, WriteNow, Written
from dsclip.saving.files import problem_of

if TYPE_CHECKING:  # importing it takes DeepSpeed's seconds
    from dsclip.engine.contrastive import ContrastiveEngine


ROOM = 1.05  # beside the tensors: containers, tokenizer, manifest
_copies = itertools.count()  # of this process; the same on all ranks


class SavedTokenizer(Protocol):
    """The tokenizer that goes with a checkpoint."""

    def save(self, folder: Path) -> None:
        """Writes its files into the folder."""


class Lock(Protocol):
    """A run's hold on its folder."""

    def held(self) -> bool:
        """Whether no other run has taken the folder over."""


class NotSaved(RunFailed):
    """A checkpoint that could not be written. Raised on all ranks alike; nothing of it is left, and others are untouched."""


class NoRoom(NotSaved):
    """The disk is too full for a checkpoint."""


@dataclass
class UnderWay:
    """A checkpoint that is being written. written: this rank's part, once it is."""

    state: LaterRunState
    subject: str
    written: Written | None = None


class CheckpointStore:
    """`<run>/checkpoints/step_XXXXXXXX/`. A folder counts only when its manifest, written last, is there."""

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        tokenizer: SavedTokenizer,
        lineage: Lineage | None = None,
        lock: Lock | None = None,
        background: Background | None = None,
    ):
        """lock: a run's lock, which must still be held when a checkpoint is written. background: writes what is copied."""
        self.folder = run_dir / "checkpoints"
        self._background = background
        self._under_way: UnderWay | None = None
        self._keep, self._tokenizer, self._lock = keep, tokenizer, lock
        self._lineage = lineage or Lineage(run_dir.name)

    def save(
        self,
        engine: ContrastiveEngine,
        data_state: dict[str, Any],
        recipe: dict[str, dict[str, Any]],
        counters: Mapping[str, Any] | None = None,
    ) -> Path:
        """Saves step `engine.step`, with what the run counted so far. Collective: every rank writes its ZeRO shards.

        data_state: the position of this rank in the data after that step. Raises UserError when another run has taken over
        the folder, NotSaved when a file can't be written, and NoRoom, if possible before anything is, when the disk is too full.
        Nothing may be under way.
        """
        files = WriteNow()
        state = self._state(engine, files, data_state, recipe, counters)
        return self._commit(state, engine.group, files.written())

    def copy(
        self,
        engine: ContrastiveEngine,
        data_state: dict[str, Any],
        recipe: dict[str, dict[str, Any]],
        counters: Mapping[str, Any] | None = None,
    ) -> None:
        """As `save`, but what is to be saved is only copied; other processes write it, and `finish` makes it a checkpoint."""
        if self._background is None or self._under_way is not None:
            raise RuntimeError("a copy needs a background with nothing under way")
        files = self._background.files()
        state = self._state(engine, files, data_state, recipe, counters)
        self._background.write(files)
        self._under_way = UnderWay(state, f"checkpoint {next(_copies)}")

    @property
    def in_background(self) -> bool:
        """Whether `copy` can be used."""
        return self._background is not None

    @property
    def under_way(self) -> int | None:
        """The step that is being written; the same on all ranks."""
        return None if self._under_way is None else self._under_way.state["step"]

    def finish(self, group: Collectives, *, wait: bool) -> tuple[Path, float] | None:
        """The checkpoint that was under way and the seconds that its slowest rank wrote; None while a rank writes, unless all wait.

        Collective, without a look at a device while nothing is finished. Raises as `save`, and NotSaved when a rank's writing
        process has died; nothing is under way then.
        """
        if (under_way := self._under_way) is None or self._background is None:
            return None
        if under_way.written is None and (written := self._background.written(wait=wait)) is not None:
            under_way.written = written
            group.arrive(under_way.subject)
        if not (wait or group.all_arrived(under_way.subject)) or under_way.written is None:
            return None
        self._under_way = None
        folder = self._commit(under_way.state, group, under_way.written)
        return folder, max(group.all_gather_object(under_way.written.seconds))

    def close(self) -> None:
        """Ends the writing process. What is under way is given up."""
        if self._background is not None:
            self._background.close()

    def _state(
        self,
        engine: ContrastiveEngine,
        files: Files,
        data_state: dict[str, Any],
        recipe: dict[str, dict[str, Any]],
        counters: Mapping[str, Any] | None,
    ) -> LaterRunState:
        """Makes the folder and gives the engine's part of its content to `files`; the manifest's."""
        group = engine.group
        self._check_lock(group)
        temporary = self._temporary(engine.step)
        self._needed = engine.bytes_to_save() * ROOM
        self._prepare(temporary, group)
        return {
            "step": engine.step,
            "samples": engine.step * engine.recipe.batch.global_batch_size,
            "world_size": group.world_size,
            "zero_stage": engine.ds_config["zero_optimization"]["stage"],
            "model": asdict(engine.config),
            "recipe": recipe,
            "lineage": asdict(self._lineage),
            "counters": dict(counters or {}),
            "engine": engine.save(temporary, files),
            "data": group.all_gather_object(data_state),
        }

    def _commit(self, state: LaterRunState, group: Collectives, written: Written) -> Path:
        """The files of all ranks become a checkpoint, or none does. Collective."""
        temporary = self._temporary(state["step"])
        self._check_written(written.problem, temporary, group)
        self._check_lock(group)
        write_manifest(temporary, state, group, written.entries)
        self._lineage = self._lineage.saved(state["step"])
        final = temporary.with_suffix("")
        if group.rank == 0:
            _replace(final, temporary)
            self._remove_old()
        group.barrier()
        return final

    def _temporary(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.tmp"

    def find(self, step: int) -> Path | None:
        """The run's own complete checkpoint of a step, if it has one."""
        path = self.folder / f"step_{step:08d}"
        return path if step in self._lineage.steps and path in complete_checkpoints(self.folder) else None

    def _check_lock(self, group: Collectives) -> None:
        lost = group.broadcast_object(self._lock is not None and not self._lock.held())
        if lost:
            raise UserError(
                f"another run took over {self.folder.parent} while this one was stopped; nothing more is written there"
            )

    def _prepare(self, temporary: Path, group: Collectives) -> None:
        """An empty folder with the tokenizer, where the rest has room. Rank 0 makes it."""
        problem = None
        if group.rank == 0:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                if shutil.disk_usage(temporary).free < self._needed:
                    problem = Problem("the disk is too full", no_room=True)
                else:
                    self._tokenizer.save(temporary / "tokenizer")
            except OSError as error:
                problem = problem_of(error, temporary)
        self._check_written(problem, temporary, group)

    def _check_written(self, problem: Problem | None, temporary: Path, group: Collectives) -> None:
        """Raises, on all ranks alike, when one of them has a problem. Collective."""
        problems = [p for p in group.all_gather_object(problem) if p is not None]
        if not problems:
            return
        if group.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        newest = f"The newest checkpoint is {self._newest()}"
        if any(p.no_room for p in problems):
            free = group.broadcast_object(shutil.disk_usage(self.folder).free if group.rank == 0 else 0)
            raise NoRoom(
                f"a checkpoint takes {self._needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free in {self.folder}; make room there. {newest}"
            )
        group.barrier()
        raise NotSaved(f"{problems[0].text}. {newest}")

    def _newest(self) -> str:
        return f"that of step {max(self._lineage.steps)}" if self._lineage.steps else "none: nothing is saved yet"

    def _remove_old(self) -> None:
        """Only checkpoints that lead to the present state count and are removed."""
        of_this_state = [c for c in complete_checkpoints(self.folder) if step_of(c) in self._lineage.steps]
        for folder in of_this_state[: -self._keep]:
            # Half removed, it must not look complete; and the step may be saved again meanwhile.
            aside = folder.rename(folder.with_name(folder.name + ".removed.tmp"))
            if self._background is None:
                shutil.rmtree(aside, ignore_errors=True)
            else:
                self._background.remove(aside)


def _replace(final: Path, temporary: Path) -> None:
    """Puts a finished checkpoint into its place; one that stood there goes only afterwards."""
    old = final.with_name(final.name + ".old.tmp")
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    on_disk(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(folder: Path) -> list[str]:
    """Removes what saves and removals that were killed left behind; returns the names of these folders."""
    names = []
    for path in sorted(folder.glob("step_*.tmp")):
        final = folder / path.name.removesuffix(".tmp").removesuffix(".old")
        if path.name.endswith(".old.tmp") and not final.exists():
            path.rename(final)
            continue
        names.append(path.name)
        shutil.rmtree(path, ignore_errors=True)
    return names
