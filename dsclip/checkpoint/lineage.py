"""Which checkpoints lead to a run's present state.

`run.json` in a run's folder says which run it is, its branch (one more after each rewind), and the step at which that branch
begins. Each manifest holds the same and the steps of the checkpoints before it. So a checkpoint that a rewind left behind is
never continued, counted or removed, even if the rewind was killed before it could move it away.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict

from dsclip.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from dsclip.errors import UserError
from dsclip.files import sha256, write_whole

RUN_FILE = "run.json"
STEP_FOLDER = re.compile(r"step_(\d{8,})")


class Parent(TypedDict):
    """Another run's checkpoint that a run continues. run: its id, None of a version that had none; sha256: of its manifest."""

    run: str | None
    step: int
    path: str
    sha256: str


@dataclass(frozen=True)
class Lineage:
    """run: a random id; start: the step at which the branch begins; steps: earlier checkpoints, the oldest first.

    parent: the other run's checkpoint that this run began from, if it did. abandoned: steps that a
    rewind left, for checkpoints of earlier versions, which don't say their branch. skipped: (first, last) numbers of the global
    batches, counted from 1, that are never trained on: one pair for each time that the run went back for a spike.
    """

    run: str
    branch: int = 1
    start: int = 0
    parent: Parent | None = None
    steps: tuple[int, ...] = ()
    abandoned: tuple[int, ...] = ()
    skipped: tuple[tuple[int, int], ...] = ()

    def skips(self, batch: int) -> bool:
        """Whether that global batch is one of those that are never trained on."""
        return any(first <= batch <= last for first, last in self.skipped)

    def saved(self, step: int) -> Lineage:
        """The lineage with one more checkpoint."""
        return replace(self, steps=(*(s for s in self.steps if s < step), step))

    def holds(self, manifest: Manifest) -> bool:
        """Whether a checkpoint in the run's folder is of this branch or of what came before it."""
        origin, step = manifest.get("lineage"), manifest["step"]
        if step <= self.start:
            return True
        if not isinstance(origin, dict):  # an earlier version wrote it
            return step not in self.abandoned
        return (origin.get("run"), origin.get("branch")) == (self.run, self.branch)


def read_lineage(run_dir: Path) -> Lineage | None:
    """What `run.json` says; None for a folder that has none. Raises UserError when it is damaged."""
    path = run_dir / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        run, branch, start = str(content["run"]), int(content["branch"]), int(content["start"])
        abandoned = tuple(int(step) for step in content.get("abandoned", ()))
        return Lineage(
            run, branch, start, content.get("parent"), abandoned=abandoned, skipped=_pairs(content.get("skipped", ()))
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and give a checkpoint with --resume PATH") from error


def write_lineage(run_dir: Path, lineage: Lineage) -> None:
    """Writes `run.json`, whole or not at all."""
    content = {name: value for name, value in asdict(lineage).items() if name != "steps"}
    write_whole(run_dir / RUN_FILE, json.dumps(content, indent=1) + "\n")


def continued(
    run_dir: Path, resume: Path | None, manifest: Manifest | None, *, same_run: bool, later: list[int]
) -> Lineage:
    """The lineage of a run that starts in `run_dir`, from the checkpoint `resume` with this manifest, or afresh.

    same_run: the checkpoint is this run's; later: steps of the run's later ones, which the new branch leaves. Batches that either
    the run or the checkpoint left out stay out.
    """
    if resume is None or manifest is None:
        return Lineage(uuid.uuid4().hex)
    origin = manifest.get("lineage") or {}
    skipped = _pairs(origin.get("skipped", ()))
    earlier = origin.get("steps") or (step_of(c) for c in complete_checkpoints(run_dir / "checkpoints"))
    steps = (*sorted(s for s in earlier if s < manifest["step"]), manifest["step"])
    if not same_run:
        parent: Parent = {
            "run": origin.get("run"), "step": manifest["step"], "path": str(resume.resolve()),
            "sha256": sha256(resume / MANIFEST),
        }  # fmt: skip
        return Lineage(uuid.uuid4().hex, start=manifest["step"], parent=parent, steps=steps, skipped=skipped)
    present = read_lineage(run_dir)
    if present is None:
        return Lineage(uuid.uuid4().hex, start=manifest["step"], steps=steps, abandoned=tuple(later), skipped=skipped)
    if later:
        present = replace(present, branch=present.branch + 1, start=manifest["step"], abandoned=tuple(later))
    own = present.skipped
    return replace(present, steps=steps, skipped=(*own, *(pair for pair in skipped if pair not in own)))


def _pairs(listed: Iterable[Iterable[int]]) -> tuple[tuple[int, int], ...]:
    """As JSON holds them, as they are compared."""
    return tuple((int(first), int(last)) for first, last in listed)


def step_of(folder: Path) -> int:
    """The step of a checkpoint by its folder's name."""
    return int(folder.name.removeprefix("step_"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first; half-written ones have another name or no manifest."""
    complete = [p for p in folder.glob("step_*") if STEP_FOLDER.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(complete, key=step_of)


def newest_leading(
    run_dir: Path, check: Callable[[Path], Manifest], damaged: list[str] | None = None, before: int | None = None
) -> tuple[Path, Manifest] | None:
    """The newest complete checkpoint that leads to the run's present state, with what `check` returns for it.

    before: only of earlier steps than this; damaged: takes what is wrong with newer ones that were passed over; without it the first that is damaged is an error. So
    it is when none is left. Raises UserError.
    """
    complete = [c for c in complete_checkpoints(run_dir / "checkpoints") if before is None or step_of(c) < before]
    lineage = read_lineage(run_dir) if complete else None
    for folder in reversed(complete):
        try:
            if lineage is None or lineage.holds(read_manifest(folder)):
                return folder, check(folder)
        except UserError as error:
            if damaged is None:
                raise
            damaged.append(str(error))
    if damaged:
        raise UserError(
            f"no checkpoint of {run_dir} can be continued. The newest: {damaged[0]} Begin afresh in another folder with "
            "train.name=NAME."
        )
    return None


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint that leads to the run's present state."""
    found = newest_leading(run_dir, read_manifest)
    return None if found is None else found[0]
