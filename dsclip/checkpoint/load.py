"""Finds a checkpoint and loads it into an engine, verified first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dsclip.checkpoint.fits import check_fits
from dsclip.checkpoint.lineage import complete_checkpoints, newest_checkpoint
from dsclip.checkpoint.manifest import MANIFEST, Manifest, read_manifest, verify
from dsclip.engine.state import Sharding
from dsclip.errors import UserError

if TYPE_CHECKING:  # importing it takes DeepSpeed's seconds
    from dsclip.engine.contrastive import ContrastiveEngine


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
