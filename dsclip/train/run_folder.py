"""The folder of a run: what may begin or continue in it, who holds it, and where a rewind puts what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dsclip.checkpoint import Lineage, Manifest, complete_checkpoints, find_checkpoint, read_manifest
from dsclip.checkpoint.lineage import RUN_FILE, continued, newest_leading, read_lineage, step_of, write_lineage
from dsclip.checkpoint.manifest import MANIFEST, verify
from dsclip.checkpoint.store import remove_unfinished
from dsclip.checkpoint.weights_alone import check_continuable
from dsclip.config import Recipe, dump_recipe
from dsclip.distributed import Collectives
from dsclip.errors import UserError
from dsclip.files import sha256
from dsclip.train.metrics_log import drop_entries_after, keep_trouble
from dsclip.train.run_lock import LOCK, RunLock
from dsclip.train.supervisor.journal import JOURNAL, RECORD

T = TypeVar("T")
ARCHIVE = "archive"
# What a run leaves that ended before its first logged step.
BEGUN = {"config.yaml", "ds_config.json", "metrics.jsonl", "tb", LOCK, RUN_FILE, JOURNAL, RECORD}


def find_resume(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint to continue from, or None for a fresh run. Writes nothing, and reads no more of it than its manifest.

    Raises UserError for a place where no run can be, for a run that exists already, and for another run's checkpoint.
    """
    _check_place(run_dir)
    if resume == "auto":
        found = newest_leading(run_dir, read_manifest, damaged=[])
        return _parent(run_dir) if found is None else found[0]
    if resume == "none":
        if not _is_unused(run_dir):
            raise UserError(
                f"{run_dir} exists already. Continue it with --resume auto, or choose another folder with train.name=NAME."
            )
        return None
    checkpoint = find_checkpoint(Path(resume))
    check_continuable(read_manifest(checkpoint), checkpoint)
    if not (is_of_run(checkpoint, run_dir) or _is_unused(run_dir)):
        raise UserError(
            f"{checkpoint} is not one of the checkpoints in {run_dir}, which holds a run already. Continue from it in a folder of "
            "its own with train.name=NAME, or continue the run that is there with --resume auto."
        )
    return checkpoint


def _parent(run_dir: Path) -> Path | None:
    """The other run's checkpoint that a run without one of its own began from, also where a rewind has archived it."""
    lineage = read_lineage(run_dir)
    if lineage is None or not lineage.parent or complete_checkpoints(run_dir / "checkpoints"):
        return None
    path = Path(lineage.parent.get("path", "of an unknown place"))
    archived = path.parent.parent.glob(f"{ARCHIVE}/*/checkpoints/{path.name}")
    for place in (path, *sorted(archived)):
        if (place / MANIFEST).is_file() and sha256(place / MANIFEST) == lineage.parent.get("sha256"):
            return place
    raise UserError(
        f"{run_dir} has saved nothing yet and began from the checkpoint {path}, which is gone or is another one by now. Give "
        "one with --resume PATH, or begin afresh with --resume none."
    )


def is_of_run(checkpoint: Path, run_dir: Path) -> bool:
    """Whether a checkpoint stands in the run's folder, and in none of its archived branches."""
    return checkpoint.resolve().parent == (run_dir / "checkpoints").resolve()


def _check_place(run_dir: Path) -> None:
    """Before anything is built: where the folder is to be, something may stand in the way, or nothing may be written."""
    existing = next(p for p in (run_dir, *run_dir.parents) if p.exists() or p.is_symlink())
    if not existing.is_dir():
        raise UserError(f"{existing} is no folder, so a run can't be written there; change train.output or train.name")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} is not writable; choose another place with train.output=DIR")


def _is_unused(run_dir: Path) -> bool:
    """Whether a run can begin here: no folder, or only what a run leaves that ended before its first logged step."""
    if not run_dir.exists():
        return True
    if any(p.name not in BEGUN for p in run_dir.iterdir()):
        return False
    metrics = run_dir / "metrics.jsonl"
    return not metrics.exists() or metrics.stat().st_size == 0


class RunFolder:
    """A run's folder while it is held by this run. Every method is collective; rank 0 does the work.

    resume: the checkpoint to continue from, verified, or None, and its manifest; lineage: of the checkpoints that will be
    written; messages: what people should know about what was found and moved.
    """

    def __init__(self, run_dir: Path, resume: str, group: Collectives):
        """Locks the folder and looks again which checkpoint is the newest, or with `auto` the newest that isn't damaged.

        Raises UserError on every rank or none.
        """
        self._run_dir, self._group = run_dir, group
        self.lock: RunLock | None = None
        self.messages: list[str] = []
        self._skip: tuple[int, int] | None = None
        self.lineage = Lineage(run_dir.name)

        def lock() -> tuple[Path | None, Manifest | None]:
            self.lock = RunLock.take(run_dir, _say)
            if removed := remove_unfinished(run_dir / "checkpoints"):
                self.messages.append(f"removed what an interrupted save left: {', '.join(removed)}")
            path = find_resume(resume, run_dir)
            damaged: list[str] = []
            if resume == "auto" and (found := newest_leading(run_dir, verify, damaged)):
                self.messages += [f"{problem} The run goes on from {found[0]}." for problem in damaged]
                return found
            return path, None if path is None else verify(path)

        self.resume, self.manifest = self._on_rank_0(lock)

    def checkpoint_before(self, step: int) -> Path | None:
        """The newest checkpoint of this run from before `step`; None where there is none."""

        def find() -> Path | None:
            found = newest_leading(self._run_dir, read_manifest, [], before=step)
            return None if found is None else found[0]

        return self._on_rank_0(find)

    def go_back(self, before: int, skipped: tuple[int, int]) -> None:
        """From now on the run continues its newest whole checkpoint from before a step, and leaves out some batches for good.

        To be claimed then, which writes it down. skipped: the first and the last of these batches.
        """
        damaged: list[str] = []

        def find() -> tuple[Path, Manifest]:
            found = newest_leading(self._run_dir, verify, damaged, before)
            if found is None:
                raise UserError(f"{self._run_dir} has no checkpoint from before step {before} any more")
            return found

        self.resume, self.manifest = self._on_rank_0(find)
        self.messages = [f"{problem} The run goes back to {self.resume}." for problem in damaged]
        self._skip = skipped

    def claim(self, recipe: Recipe, ds_config: dict[str, Any]) -> None:
        """Writes down how the run is configured; moves checkpoints later than the resumed one into the archive."""

        def claim() -> Lineage:
            same_run = self.resume is not None and is_of_run(self.resume, self._run_dir)
            step = self.manifest["step"] if self.manifest else 0
            later = [c for c in complete_checkpoints(self._run_dir / "checkpoints") if step_of(c) > step]
            steps = [step_of(c) for c in later]
            lineage = continued(self._run_dir, self.resume, self.manifest, same_run=same_run, later=steps)
            if self._skip is not None:
                lineage = replace(lineage, skipped=(*lineage.skipped, self._skip))
            write_lineage(self._run_dir, lineage)  # first: from here on the later ones are none of this run's
            if later:
                self.messages.append(_archive(self._run_dir, later, step))
            metrics = self._run_dir / "metrics.jsonl"
            if self._skip is not None:
                keep_trouble(metrics, step)
            if later:
                drop_entries_after(metrics, step)
            (self._run_dir / "config.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
            (self._run_dir / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")
            return lineage

        self.lineage, self._skip = self._on_rank_0(claim), None

    def release(self) -> None:
        """Gives the folder free; not collective, so that it also serves a rank that fails."""
        if self.lock is not None:
            self.lock.release()

    def _on_rank_0(self, work: Callable[[], T]) -> T:
        """work() on rank 0 and its result on every rank; its UserError and OSError on every rank too."""
        problem: str | None = None
        results: list[T] = []
        if self._group.rank == 0:
            try:
                results.append(work())
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{self._run_dir} can't be written to ({error}); choose another place with train.output=DIR"
        problem, results = self._group.broadcast_object((problem, results))
        if problem:
            self.release()
            raise UserError(problem)
        return results[0]


def _say(text: str) -> None:
    print(f"dsclip: {text}", file=sys.stderr, flush=True)


def _archive(run_dir: Path, later: list[Path], step: int) -> str:
    """Moves what a rewind to `step` leaves behind to `archive/branch_K`, laid out like a run, with all curves; returns a line about it."""
    number = 1
    while (target := run_dir / ARCHIVE / f"branch_{number}_after_step_{step:08d}").exists():
        number += 1
    (target / "checkpoints").mkdir(parents=True)
    for checkpoint in later:
        checkpoint.rename(target / "checkpoints" / checkpoint.name)
    for name in ("config.yaml", "ds_config.json", "metrics.jsonl", "data_journal.jsonl"):
        if (run_dir / name).is_file():
            shutil.copy2(run_dir / name, target / name)
    if (run_dir / "tb").is_dir():
        shutil.copytree(run_dir / "tb", target / "tb")
    for name in ("summary.json", "summary.md", "hf"):
        if (run_dir / name).exists():
            (run_dir / name).rename(target / name)
    steps = ", ".join(str(step_of(c)) for c in later)
    return f"rewound to step {step}: the later checkpoints (step {steps}) and their curves were moved to {target}"
