"""The checkpoints of one run: written aside and renamed when complete, the newest found again, old ones removed."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict
from pathlib import Path

from dsclip.checkpoint.manifest import MANIFEST, read_manifest, verify, write_manifest
from dsclip.errors import UserError

STEP_FOLDER = re.compile(r"step_(\d{8,})")


class CheckpointStore:
    """`<run>/checkpoints/step_XXXXXXXX/`. A folder counts only when its manifest, written last, is there."""

    def __init__(self, run_dir: Path, keep: int, tokenizer):
        self.folder = run_dir / "checkpoints"
        self._keep, self._tokenizer = keep, tokenizer

    def save(self, engine, data_state: dict, recipe: dict) -> Path:
        """Saves step `engine.step`. Collective: ZeRO shards are written by every rank."""
        group = engine.group
        final = self.folder / f"step_{engine.step:08d}"
        temporary = final.with_name(final.name + ".tmp")
        if group.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            self._tokenizer.save(temporary / "tokenizer")
        group.barrier()
        state = {
            "step": engine.step,
            "samples": engine.step * engine.recipe.batch.global_batch_size,
            "world_size": group.world_size,
            "zero_stage": engine.ds_config["zero_optimization"]["stage"],
            "model": asdict(engine.config),
            "recipe": recipe,
            "engine": engine.save(temporary),
            "data": group.all_gather_object(data_state),
        }
        group.barrier()
        write_manifest(temporary, state, group)
        if group.rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            self._remove_old()
        group.barrier()
        return final

    def _remove_old(self) -> None:
        for folder in complete_checkpoints(self.folder)[: -self._keep]:
            shutil.rmtree(folder, ignore_errors=True)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; half-written ones have another name or no manifest."""
    found = [p for p in folder.glob("step_*") if STEP_FOLDER.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: int(STEP_FOLDER.fullmatch(p.name).group(1)))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest complete one of a run folder. Raises UserError."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path} is no folder; give a checkpoint such as runs/NAME/checkpoints/step_00001000, or runs/NAME"
        )
    if (path / MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if complete := complete_checkpoints(folder):
            return complete[-1]
    read_manifest(path)  # raises, with the reason
    raise UserError(f"{path} holds no complete checkpoint")


def load_checkpoint(engine, path: Path, *, world_size: int) -> dict:
    """Verifies a checkpoint and loads it into the engine. Collective; returns its manifest.

    Rank 0 verifies, and every rank fails or none. Raises UserError when it is damaged or from another world size.
    """
    problem = manifest = None
    if engine.group.rank == 0:
        try:
            manifest = verify(path)
            _check_fits(manifest, engine, path, world_size)
        except UserError as error:
            problem = str(error)
    problem, manifest = engine.group.broadcast_object((problem, manifest))
    if problem:
        raise UserError(problem)
    engine.load(path, manifest["engine"])
    return manifest


def _check_fits(manifest: dict, engine, path: Path, world_size: int) -> None:
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
    if different := [k for k in ours if ours[k] != manifest["model"].get(k) and k != "patch_dropout"]:
        raise UserError(
            f"{path} holds another model: {', '.join(different)} differ. Resume with the recipe of that run."
        )
