"""The checkpoints of one run: written aside and renamed when complete, the newest found again, old ones removed.

Between the steps, or by other processes while training goes on: the files and the moment in which they become a checkpoint are the same.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from dsclip.checkpoint.lineage import Lineage, complete_checkpoints, step_of
from dsclip.checkpoint.manifest import MANIFEST, LaterRunState, content_of
from dsclip.checkpoint.tokenizer_files import SavedTokenizer, TokenizerFiles
from dsclip.distributed import Collectives
from dsclip.errors import RunFailed, UserError
from dsclip.saving import Background, Files, Problem, WriteNow, Written
from dsclip.saving.commit import Commit, commit, remove_folders
from dsclip.saving.files import problem_of
from dsclip.saving.hashed_file import FileEntry

if TYPE_CHECKING:  # importing it takes DeepSpeed's seconds
    from dsclip.engine.contrastive import ContrastiveEngine


ROOM = 1.05  # beside the tensors: containers, tokenizer, manifest
LOOK_S = 0.02  # between two looks at whether the other ranks have written
_copies = itertools.count()  # of this process; the same on all ranks


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
    """A checkpoint that is being written. part: what this rank said of its own, once it is written.

    seconds: that the slowest rank wrote; None until rank 0 knows of all and has the checkpoint made.
    """

    state: LaterRunState
    subject: str
    part: str | None = None
    seconds: float | None = None
    aside: list[str] = field(default_factory=list)


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
        self._keep, self._tokenizer, self._lock = keep, TokenizerFiles(tokenizer), lock
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
        group, written = engine.group, files.written()
        temporary = self._temporary(engine.step)
        parts = group.all_gather_object(_part(written, temporary))
        self._refuse([part.problem for part in parts], temporary, group)
        self._check_lock(group)
        made = commit(self._order(state, parts)) if group.rank == 0 else None
        self._refuse([group.broadcast_object(made and made.problem)], temporary, group)
        self._lineage = self._lineage.saved(engine.step)
        remove_folders(made.aside if made else [])
        group.barrier()
        return temporary.with_suffix("")

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
        """The checkpoint that was under way and the seconds that its slowest rank and then rank 0 wrote; None until all is done, unless
        all ranks wait.

        Collective, without a look at a device. Once every rank's part is on the disk, rank 0's process makes the checkpoint, which takes
        two looks at least. Raises as `save`, and NotSaved when a writing process has died; nothing is under way then.
        """
        if (under_way := self._under_way) is None or self._background is None:
            return None
        temporary = self._temporary(under_way.state["step"])
        if under_way.part is None and (written := self._background.written(wait=wait)) is not None:
            under_way.part = json.dumps(_part(written, temporary))
            group.hand_in(under_way.part, under_way.subject)
        outcome = self._outcome(under_way, self._background, group, wait=wait) if group.rank == 0 else None
        if (word := group.decide(outcome and json.dumps(outcome), under_way.subject)) is None:
            return None
        self._under_way = None
        problems, lost, seconds = json.loads(word)
        self._refuse([Problem(*problem) for problem in problems], temporary, group)
        if lost:
            raise UserError(self._taken_over)
        self._lineage = self._lineage.saved(under_way.state["step"])
        self._background.remove(under_way.aside)
        return temporary.with_suffix(""), seconds

    def _outcome(
        self, under_way: UnderWay, background: Background, group: Collectives, *, wait: bool
    ) -> tuple[list[Problem], bool, float] | None:
        """(problems, whether another run has the folder, seconds) by rank 0, when the checkpoint is made or can't be; None before."""
        if under_way.seconds is None:
            while (words := group.handed_in(under_way.part, under_way.subject)) is None:
                if not wait:
                    return None
                time.sleep(LOOK_S)
            parts = [Part(*json.loads(word)) for word in words]
            if problems := [Problem(*part.problem) for part in parts if part.problem is not None]:
                return problems, False, 0.0
            if not self._holds_lock():
                return [], True, 0.0
            under_way.seconds = max(part.seconds for part in parts)
            background.commit(self._order(under_way.state, parts))
        if (made := background.committed(wait=wait)) is None:
            return None
        under_way.aside = made.aside
        return [] if made.problem is None else [made.problem], False, under_way.seconds + made.seconds

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

    def _order(self, state: LaterRunState, parts: list[Part]) -> Commit:
        """What is left to do when all parts are on the disk. Of old checkpoints only those that lead to the present state count and go."""
        temporary = self._temporary(state["step"])
        final = temporary.with_suffix("")
        lineage = self._lineage.saved(state["step"]).steps
        of_this_state = {final, *(c for c in complete_checkpoints(self.folder) if step_of(c) in lineage)}
        return {
            "folder": str(temporary), "final": str(final), "manifest": MANIFEST, "content": content_of(state),
            "written": {name: entry for part in parts for name, entry in part.entries.items()},
            "old": [str(c) for c in sorted(of_this_state, key=step_of)[: -self._keep]],
        }  # fmt: skip

    def _temporary(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.tmp"

    def find(self, step: int) -> Path | None:
        """The run's own complete checkpoint of a step, if it has one."""
        path = self.folder / f"step_{step:08d}"
        return path if step in self._lineage.steps and path in complete_checkpoints(self.folder) else None

    def _check_lock(self, group: Collectives) -> None:
        if not group.broadcast_object(group.rank != 0 or self._holds_lock()):
            raise UserError(self._taken_over)

    def _holds_lock(self) -> bool:
        return self._lock is None or self._lock.held()

    @property
    def _taken_over(self) -> str:
        return f"another run took over {self.folder.parent} while this one was stopped; nothing more is written there"

    def _prepare(self, temporary: Path, group: Collectives) -> None:
        """An empty folder with the tokenizer, where the rest has room. Rank 0 makes it."""
        problem, free = None, 0
        if group.rank == 0:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                free = shutil.disk_usage(temporary).free
                if free >= self._needed:
                    self._tokenizer.save(temporary / "tokenizer")
            except OSError as error:
                problem = problem_of(error, temporary)
        problem, free = group.broadcast_object((problem, free))
        self._refuse([problem], temporary, group)
        if free < self._needed:
            self._give_up(temporary, group)
            raise NoRoom(
                f"a checkpoint takes {self._needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free in {self.folder}; make room there. {self._newest()}"
            )

    def _refuse(self, found: list[Problem | None], temporary: Path, group: Collectives) -> None:
        """Raises when a rank has a problem. found: the same on all ranks, which raise alike."""
        problems = [p for p in found if p is not None]
        if not problems:
            return
        self._give_up(temporary, group)
        if full := next((p for p in problems if p.no_room), None):
            raise NoRoom(
                f"{full.text}: a checkpoint takes {self._needed / 1e9:.3g} GB; make room there. {self._newest()}"
            )
        raise NotSaved(f"{problems[0].text}. {self._newest()}")

    def _give_up(self, temporary: Path, group: Collectives) -> None:
        """Nothing of it is left. Collective."""
        if group.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        group.barrier()

    def _newest(self) -> str:
        steps = self._lineage.steps
        return f"The newest checkpoint is {f'that of step {max(steps)}' if steps else 'none: nothing is saved yet'}"


class Part(NamedTuple):
    """What a rank says of its part of a checkpoint, as JSON holds it. entries: its files by their paths in the folder."""

    entries: dict[str, FileEntry]
    problem: Problem | None
    seconds: float


def _part(written: Written, folder: Path) -> Part:
    entries = {Path(path).relative_to(folder).as_posix(): entry for path, entry in written.entries.items()}
    return Part(entries, written.problem, written.seconds)


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
