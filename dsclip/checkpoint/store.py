"""The checkpoints of one run: written aside and renamed when complete, the newest found again, old ones removed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsclip.checkpoint.fits import check_fits
from dsclip.checkpoint.lineage import Lineage, complete_checkpoints, newest_checkpoint, step_of
from dsclip.checkpoint.manifest import MANIFEST, LaterRunState, Manifest, read_manifest, verify, write_manifest
from dsclip.distributed import Collectives
from dsclip.engine.state import Sharding
from dsclip.errors import RunFailed, UserError
from dsclip.files import on_disk

if TYPE_CHECKING:  # importing it takes DeepSpeed's seconds
    from dsclip.engine.contrastive import ContrastiveEngine


ROOM = 1.05  # beside the tensors: containers, tokenizer, manifest


class SavedTokenizer(Protocol):
    """The tokenizer that goes with a checkpoint."""

    def save(self, folder: Path) -> None:
        """Writes its files into the folder."""


class Lock(Protocol):
    """A run's hold on its folder."""

    def held(self) -> bool:
        """Whether no other run has taken the folder over."""


class NoRoom(RunFailed):
    """The disk is too full for a checkpoint. Raised on all ranks alike; those that are there are untouched."""


class CheckpointStore:
    """`<run>/checkpoints/step_XXXXXXXX/`. A folder counts only when its manifest, written last, is there."""

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        tokenizer: SavedTokenizer,
        lineage: Lineage | None = None,
        lock: Lock | None = None,
    ):
        """lock: a run's lock, which must still be held when a checkpoint is written."""
        self.folder = run_dir / "checkpoints"
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
        the folder, and NoRoom, before anything is written, when the disk is too full.
        """
        group = engine.group
        self._check_lock(group)
        final = self.folder / f"step_{engine.step:08d}"
        temporary = final.with_name(final.name + ".tmp")
        if group.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._check_room(engine, temporary)
        if group.rank == 0:
            self._tokenizer.save(temporary / "tokenizer")
        group.barrier()
        state: LaterRunState = {
            "step": engine.step,
            "samples": engine.step * engine.recipe.batch.global_batch_size,
            "world_size": group.world_size,
            "zero_stage": engine.ds_config["zero_optimization"]["stage"],
            "model": asdict(engine.config),
            "recipe": recipe,
            "lineage": asdict(self._lineage),
            "counters": dict(counters or {}),
            "engine": engine.save(temporary),
            "data": group.all_gather_object(data_state),
        }
        group.barrier()
        write_manifest(temporary, state, group)
        self._lineage = self._lineage.saved(engine.step)
        if group.rank == 0:
            _replace(final, temporary)
            self._remove_old()
        group.barrier()
        return final

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

    def _check_room(self, engine: ContrastiveEngine, temporary: Path) -> None:
        """DeepSpeed's writers fail on a full disk rank by rank, and the others wait for them."""
        needed = engine.bytes_to_save() * ROOM
        free = engine.group.broadcast_object(shutil.disk_usage(temporary).free if temporary.exists() else 0)
        if free < needed:
            if engine.group.rank == 0:
                temporary.rmdir()
            raise NoRoom(
                f"a checkpoint takes {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free in {self.folder}; make room there. The "
                f"newest checkpoint is {self._newest()}"
            )

    def _newest(self) -> str:
        return f"that of step {max(self._lineage.steps)}" if self._lineage.steps else "none: nothing is saved yet"

    def _remove_old(self) -> None:
        """Only checkpoints that lead to the present state count and are removed."""
        of_this_state = [c for c in complete_checkpoints(self.folder) if step_of(c) in self._lineage.steps]
        for folder in of_this_state[: -self._keep]:
            aside = folder.rename(folder.with_name(folder.name + ".tmp"))  # half removed, it must not look complete
            shutil.rmtree(aside, ignore_errors=True)


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


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest complete one of a run folder. Raises UserError."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path} is no folder; give a checkpoint such as runs/NAME/checkpoints/step_00001000, or runs/NAME"
        )
    if (path / MANIFEST).is_file():
        return path
    if newest := newest_checkpoint(path):
        return newest
    if complete := complete_checkpoints(path):
        return complete[-1]
    read_manifest(path)  # raises, with the reason
    raise UserError(f"{path} holds no complete checkpoint")


def load_checkpoint(engine: ContrastiveEngine, path: Path, *, world_size: int) -> Manifest:
    """Verifies a checkpoint and loads it into the engine. Collective; returns its manifest.

    Rank 0 verifies, and every rank fails or none. Raises UserError when it is damaged, or of another kind of
    run. Other numbers of ranks and ZeRO stages than the engine's are placed anew.
    """
    problem: str | None = None
    manifest: Manifest | None = None
    if engine.group.rank == 0:
        try:
            manifest = verify(path)
        except UserError as error:
            problem = str(error)
    problem, manifest = engine.group.broadcast_object((problem, manifest))
    if manifest is None or problem:
        raise UserError(problem or f"{path} could not be read")
    load_verified(engine, path, manifest, world_size=world_size)
    return manifest


def load_verified(engine: ContrastiveEngine, path: Path, manifest: Manifest, *, world_size: int) -> None:
    """The same with a checkpoint that `verify` has just read, and whose manifest every rank has."""
    check_fits(
        manifest, path, recipe=engine.recipe, ds_config=engine.ds_config, config=engine.config, world_size=world_size
    )
    engine.load(path, manifest["engine"], Sharding(manifest["world_size"], manifest["zero_stage"]))
