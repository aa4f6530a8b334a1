"""The checkpoints of one run: written aside and renamed when complete, the newest found again, old ones removed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsclip.checkpoint.lineage import Lineage, complete_checkpoints, newest_checkpoint, step_of
from dsclip.checkpoint.manifest import MANIFEST, LaterRunState, Manifest, read_manifest, verify, write_manifest
from dsclip.checkpoint.weights_alone import check_continuable
from dsclip.config.schema import OF_WHAT_IS_TRAINED, ModelSection
from dsclip.distributed import Collectives
from dsclip.errors import RunFailed, UserError
from dsclip.files import on_disk
from dsclip.model.config import OF_THE_RUN, ClipConfig
from dsclip.optim.groups import same_groups

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

    Rank 0 verifies, and every rank fails or none. Raises UserError when it is damaged, of another kind of run, or from
    another world size.
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
    _check_fits(manifest, engine, path, world_size)
    engine.load(path, manifest["engine"])


def _check_fits(manifest: Manifest, engine: ContrastiveEngine, path: Path, world_size: int) -> None:
    check_continuable(manifest, path)
    if manifest["world_size"] != world_size:
        raise UserError(
            f"{path} was written by {manifest['world_size']} ranks and this run has {world_size}. Use as many ranks again, "
            f"or start a new run from its weights with model.init={path}."
        )
    stage = engine.ds_config["zero_optimization"]["stage"]
    if manifest["zero_stage"] != stage:
        raise UserError(
            f"{path} was written with ZeRO stage {manifest['zero_stage']} and the DeepSpeed configuration says {stage}. "
            f"Use the same stage, or start a new run from its weights with model.init={path}."
        )
    ours = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(engine.config).items()}
    theirs = {f.name: f.default for f in fields(ClipConfig)} | manifest[
        "model"
    ]  # an earlier version wrote fewer fields
    if different := [k for k in ours if k not in OF_THE_RUN and ours[k] != theirs[k]]:
        raise UserError(
            f"{path} holds another model: {', '.join(different)} differ. Resume with the recipe of that run."
        )
    section, then = engine.recipe.model, manifest["recipe"].get("model", {})
    defaults = ModelSection()  # an earlier version wrote fewer keys
    trained_then = {name: then.get(name, getattr(defaults, name)) for name in OF_WHAT_IS_TRAINED}
    if different := [name for name, value in trained_then.items() if value != getattr(section, name)]:
        settings = " ".join(f"model.{name}={trained_then[name]}" for name in different)
        raise UserError(
            f"{path} was trained with {settings}, and the optimizer has a state for what was trained alone. Resume with that, or start "
            f"a new run from its weights with model.init={path}."
        )
    name = manifest["recipe"].get("optim", {}).get("name", "adamw")  # an earlier version had no other
    if name != engine.recipe.optim.name:
        raise UserError(
            f"{path} was trained with optim.name {name}, and {engine.recipe.optim.name} has another state. Resume with that of the run, "
            f"or start a new run from its weights with model.init={path}."
        )
    if not same_groups(engine.module, manifest["recipe"].get("optim", {}), engine.recipe.optim):
        raise UserError(
            f"{path} holds other parameter groups: optim.layer_decay, rules and weight_decay divide the parameters in another way. "
            f"Resume with those of that run, or start a new run from its weights with model.init={path}."
        )
    had, needed = set(manifest["engine"].get("scalars", ())), set(engine.scalars.state())
    if had != needed:
        loss = manifest["recipe"].get("loss", {}).get("name", "another loss")
        raise UserError(
            f"{path} was trained with {loss}, which learns {_words(had)}, and loss.name {engine.recipe.loss.name} learns "
            f"{_words(needed)}. Resume with the loss of that run, or start a new run from its weights with model.init={path}."
        )


def _words(scalars: set[str]) -> str:
    return " and ".join(
        {"log_scale": "a temperature", "bias": "a bias"}.get(s, s) for s in sorted(scalars, reverse=True)
    )
