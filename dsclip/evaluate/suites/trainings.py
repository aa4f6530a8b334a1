"""Entries that fine-tune the model before they measure it: each a run of `launchers/train.py`, in processes of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsclip.child import run_training
from dsclip.command_line import say
from dsclip.data.shards.specification import DEMO
from dsclip.data.sources.storage import is_remote
from dsclip.distributed import Collectives
from dsclip.errors import RunStopped
from dsclip.evaluate.feature_cache import FeatureCache
from dsclip.evaluate.opened import OpenedModel
from dsclip.evaluate.suites.fine_tune import FineTune
from dsclip.evaluate.suites.run import Place, run_suite
from dsclip.evaluate.suites.suite import Entry, Suite, file_name, names_shards
from dsclip.files import sha256


@dataclass(frozen=True)
class Trainings:
    """How the fine-tunes of a suite are run, and how what they give is opened.

    model, tokenizer: as the command line names them. weights: the hash of the model's, on rank 0. launch: what starts
    `launchers/train.py`. impossible: why this model can't be trained, or None.
    """

    model: str
    tokenizer: str | None
    weights: str | None
    launch: Sequence[str]
    ds_config: str
    impossible: str | None
    open_run: Callable[[Path], tuple[OpenedModel, FeatureCache]]

    def measured(
        self, entry: Entry, fine_tune: FineTune, suite: Suite, group: Collectives, place: Place
    ) -> dict[str, Any]:
        """The row of an entry of the suite whose set is there, as `run_suite` gives it, with what the model was trained on. Collective.

        Raises RunStopped when the training was asked to stop; the same command goes on with it.
        """
        row: dict[str, Any] = {"name": entry.name, "task": entry.task, "groups": list(entry.groups)}
        known = self._run_folder(entry, fine_tune, place.folder) if group.rank == 0 else Path()
        run, is_done = group.broadcast_object((known, _is_done(known)))
        if self.impossible is not None:
            return row | {"state": "unsupported", "reason": self.impossible}
        if not is_done and group.world_size > 1:
            reason = "it trains the model first, in processes of its own: the same command in one process does, and keeps what is measured"
            return row | {"state": "unsupported", "reason": reason}
        if not is_done:
            shards = _place(fine_tune.train, place.data_root)
            if not (is_remote(shards) or names_shards(shards)):
                return row | {"state": "missing", "reason": f"no training shards in {shards}"}
            if (problem := self._train(entry.name, fine_tune, run, shards)) is not None:
                return row | {"state": "failed", "reason": problem}
        model, cache = self.open_run(run)
        [row] = run_suite(replace(suite, entries=(entry,)), model, cache, group, place)["entries"]
        return row | {"fine_tuned": {"config": fine_tune.config, "set": list(fine_tune.overrides), "run": str(run)}}

    def _run_folder(self, entry: Entry, fine_tune: FineTune, folder: Path) -> Path:
        """Another one for other weights, data or settings."""
        config = Path(fine_tune.config)
        recipe = config.read_text(encoding="utf-8") if config.is_file() else fine_tune.config
        identity = sha256(json.dumps([self.weights, self.tokenizer, asdict(fine_tune), recipe]).encode())[:16]
        return folder.resolve() / "fine_tuned" / f"{file_name(entry.name)}-{identity}"

    def _train(self, name: str, fine_tune: FineTune, run: Path, shards: str) -> str | None:
        """Begins the run or goes on with it; what went wrong, or None. Raises RunStopped."""
        model = self.model
        overrides = [
            f"model.init={Path(model).resolve() if Path(model).exists() else model}", "model.preset=auto",
            f"data.tokenizer={self.tokenizer or 'auto'}",
            f"data.train_shards={shards}",
            f"train.output={run.parent}", f"train.name={run.name}", "train.export_hf=false", *fine_tune.overrides,
        ]  # fmt: skip
        say(f"{name}: fine-tunes the model in {run}")
        code, stopped = run_training(self.launch, self.ds_config, fine_tune.config, overrides)
        if stopped and not _is_done(run):
            raise RunStopped(f"the fine-tuning of {name} was stopped; the same command goes on with it")
        if not _is_done(run):
            return f"its fine-tuning ended with exit code {code}; the lines above say why"
        return None


def _place(train: str, data_root: Path) -> str:
    return train if is_remote(train) or train in DEMO else str((data_root / Path(train).expanduser()).resolve())


def _is_done(run: Path) -> bool:
    return (run / "summary.json").is_file()
