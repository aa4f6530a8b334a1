"""Run on every rank: runs whose loss jumps, or that are not finite, after certain batches; writes one JSON file.

Arguments: the file, the folder, and `first` or, on other ranks than those, `elsewhere`.
"""

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from dsclip.distributed import Collectives, shutdown_distributed
from dsclip.engine.build import init_distributed
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.errors import RunFailed
from tests.distributed.runs_worker import Runs

ON = ["train.spike_window=10", "train.save_every=5", "train.keep_checkpoints=4", "optim.lr=1e-5"]
BACK = [*ON, "train.on_spike=rollback"]


@contextlib.contextmanager
def planted(*, bad: tuple[int, ...] = (), nan: tuple[int, ...] = (), dies_at: int | None = None) -> Iterator[None]:
    """The temperature is ruined before a `bad` batch, and pixels of a `nan` one are not finite; the job fails at a step."""
    original = ContrastiveEngine.train_step

    def train_step(self, batch, **options):
        number = batch.state["batches"]
        if number in nan:
            batch = replace(batch, images=batch.images.float() * torch.nan)
        if self.step + 1 == dies_at and number > dies_at:  # not before the run went back
            raise RunFailed("lost")
        if number in bad:
            self.scalars.log_scale.data.fill_(math.log(5000))
        return original(self, batch, **options)

    with patch.object(ContrastiveEngine, "train_step", train_step):
        yield


def first(runs: Runs, folder: Path, group: Collectives) -> None:
    with planted(bad=(19, 20)):
        runs.start("back", "back", "train.steps=26", *BACK)
    with planted(bad=(12, 13)):
        runs.start("nothing saved", "nothing", "train.steps=15", *BACK, "train.save_every=null")
    with planted(bad=(19, 20), dies_at=13):
        runs.start("killed", "killed", "train.steps=26", *BACK)
    if group.rank == 0:
        shutil.copytree(folder / "runs" / "killed", folder / "runs" / "elsewhere")
    group.barrier()
    runs.start("killed again", "killed", "train.steps=26", *BACK, "--resume", "auto")
    with planted(bad=(39, 40)):
        runs.start("once", "back", "train.steps=32", *BACK, "train.max_rollbacks=1", "--resume", "auto")
    with planted(nan=(14, 15)):
        options = ["train.max_nonfinite_steps=2", "train.on_nonfinite=rollback"]
        runs.start("not finite", "not_finite", "train.steps=18", *ON, *options)


def main(out: str, folder: str, which: str) -> None:
    init_distributed()
    group = Collectives.current()
    runs = Runs(Path(folder), group)
    if which == "first":
        first(runs, Path(folder), group)
    else:
        runs.start("elsewhere", "elsewhere", "train.steps=26", *BACK, "--resume", "auto")
    if group.rank == 0:
        Path(out).write_text(json.dumps(runs.results))
    shutdown_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
