"""What a resumed run takes over from its checkpoint, and what is different from now on."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from dsclip.checkpoint import Manifest
from dsclip.config import Recipe
from dsclip.config.old_names import with_new_names
from dsclip.config.schema import BatchSection, OptimSection
from dsclip.data import merge_states
from dsclip.engine.state import Sharding
from dsclip.errors import UserError
from dsclip.optim.schedule import learning_rate
from dsclip.train.records import Resume

CHECKPOINT = "the checkpoint's recipe"  # in messages
# Where a run stands and how it is called changes nothing in it; with `model.init` only a fresh run begins.
UNSHOWN = {"train.name", "train.output", "model.init"}


Sections = dict[str, dict[str, Any]]  # of a recipe, as a manifest holds it


class Resumed:
    """The manifest of the checkpoint that a run continues, None for one that starts afresh, and what the recipe changes against it."""

    def __init__(self, manifest: Manifest | None, recipe: Recipe):
        self.manifest, self._recipe = manifest, recipe
        self.changes = changed_keys(manifest["recipe"], recipe) if manifest else {}

    @property
    def data_state(self) -> dict[str, Any] | None:
        """The position in the data of all ranks together. Raises UserError for one of an earlier version."""
        return merge_states(self.manifest["data"]) if self.manifest else None

    def data_state_of(self, rank: int, world_size: int) -> dict[str, Any] | None:
        """The position of one rank of so many, as it was saved by as many, or its share of the streams of all."""
        if self.manifest is None or len(self.manifest["data"]) == world_size:
            return self.manifest["data"][rank] if self.manifest else None
        whole = merge_states(self.manifest["data"])
        share = len(whole["drawn"]) // world_size
        return whole | {"first": rank * share, "drawn": whole["drawn"][rank * share : (rank + 1) * share]}

    @property
    def counters(self) -> dict[str, Any] | None:
        """What earlier launches counted."""
        return self.manifest.get("counters") if self.manifest else None

    @property
    def guard(self) -> dict[str, Any] | None:
        """What the guard of that run remembered; an earlier version had none."""
        return (self.counters or {}).get("guard")

    @property
    def record(self) -> Resume | None:
        """For the summary."""
        return {"step": self.manifest["step"], "changes": self.changes} if self.manifest else None

    def describe(self, path: Path | None, now: Sharding) -> list[str]:
        """Lines for the log."""
        if self.manifest is None:
            return []
        step = self.manifest["step"]
        was = Sharding(self.manifest["world_size"], self.manifest["zero_stage"])
        resharded = f", written by {was}, on {now}" if was != now else ""
        return [f"continued from {path}{resharded}", *describe_changes(self.manifest["recipe"], self._recipe, step)]


def check_length(manifest: Manifest, resume: Path, steps: int) -> None:
    """Raises UserError when a checkpoint is beyond the end of the run."""
    reached = manifest["step"]
    if steps < reached:
        raise UserError(
            f"train.steps is {steps}, and {resume} is at step {reached} already. Raise train.steps to train on, or go back with "
            "--resume to an earlier checkpoint."
        )


def keep_planned_sizes(batch: BatchSection, was: dict[str, Any], world_size: int) -> BatchSection:
    """The batch section with what it leaves open taken from `was`, the planned one of the checkpoint.

    A plan follows free memory, and a batch that is cut differently adds up in another order: a resumed run would not go on
    bit for bit. With another global batch, or `accumulation: manual`, nothing is taken.
    """
    if batch.accumulation == "manual" or was.get("global_batch_size") != batch.global_batch_size:
        return batch
    was = with_new_names("batch", was, CHECKPOINT)
    micro_batch = batch.micro_batch_size or was.get("micro_batch_size") or batch.global_batch_size // world_size
    checkpointing = was.get("checkpointing", "auto") if batch.checkpointing == "auto" else batch.checkpointing
    chunk = batch.chunk_size or was.get("chunk_size") or (micro_batch if checkpointing != "none" else None)
    coalesce = was.get("coalesce_reduction") if batch.coalesce_reduction is None else batch.coalesce_reduction
    return replace(
        batch,
        micro_batch_size=micro_batch,
        chunk_size=None if chunk is None else min(chunk, micro_batch),
        checkpointing=checkpointing,
        coalesce_reduction=coalesce,
    )


def changed_keys(was: Sections, recipe: Recipe) -> dict[str, list[Any]]:
    """{key: [value in the checkpoint, value now]} of two recipes. was: as a manifest holds it; keys it lacks aren't compared."""
    changed = {}
    for section, values in asdict(recipe).items():
        before = with_new_names(section, was.get(section, {}), CHECKPOINT)
        for name, value in values.items():
            key = f"{section}.{name}"
            if key not in UNSHOWN and name in before and before[name] != _as_json(value):
                changed[key] = [before[name], value]
    return changed


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def describe_changes(was: Sections, recipe: Recipe, step: int) -> list[str]:
    """Lines for the log: each key that changed, old → new, and what that does to the learning rate at the next step."""
    lines = [
        f"changed since the checkpoint: {k} {_show(a)} → {_show(b)}" for k, (a, b) in changed_keys(was, recipe).items()
    ]
    known = {f.name for f in fields(OptimSection)}
    before = OptimSection(**{k: v for k, v in was.get("optim", {}).items() if k in known})
    steps = was.get("train", {}).get("steps", recipe.train.steps)
    old, new = learning_rate(step, steps, before), learning_rate(step, recipe.train.steps, recipe.optim)
    if lines and old != new and step < recipe.train.steps:
        lines.append(
            f"the learning rate of step {step + 1} is therefore {new:.3g} instead of {old:.3g}"
            + (", and falls with the new number of steps" if steps != recipe.train.steps else "")
        )
    return lines


def _show(value: object) -> str:
    return "null" if value is None else str(value)
