"""What a run does about a loss that jumped, and about steps in a row that are not finite: it says so, ends, or goes back.

Going back means the last checkpoint from before the trouble, and on from there without the batches that led to it, as was done by
hand for PaLM (Chowdhery et al. 2022, section 5.1). All ranks decide alike: loss and gradient norm are the same on all of them.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsclip.checkpoint import Lineage
from dsclip.config.train_section import TrainSection
from dsclip.data.batch import Batch, LoadReport, summed
from dsclip.distributed import Collectives
from dsclip.engine.host_copy import HostCopy
from dsclip.errors import RunDiverged
from dsclip.train.counters import Tally
from dsclip.train.run_folder import RunFolder
from dsclip.train.spike_rule import LEAD, WITHIN, Spike, SpikeRule
from dsclip.train.watch import Watch

if TYPE_CHECKING:  # importing it takes DeepSpeed's seconds
    from dsclip.engine.step_metrics import StepMetrics

SKIPPED = "skipped_batches.jsonl"  # in the run's folder
ADVICE = {
    "rollback": "",
    "warn": ". To go back to before it: train.on_spike=rollback, or a checkpoint with --resume PATH; against the next: a lower optim.lr or "
    "optim.beta2, or optim.name=stable_adamw",
}


@dataclass(eq=False)
class RollBack(Exception):
    """The run goes back to before step `before`, and never trains on batches first … last. Raised on all ranks alike.

    samples: {batch: ids of its samples}, None for batches of an earlier launch; tally: of the launch until then.
    """

    why: str
    before: int
    batches: tuple[int, int]
    samples: dict[int, list[int] | None]
    tally: Tally | None = None

    def write(self, run_dir: Path) -> None:
        """A line for each batch that is left out and has none yet, into the run's folder."""
        path = run_dir / SKIPPED
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        written = {json.loads(line)["batch"] for line in lines}
        with path.open("a", encoding="utf-8") as file:
            for batch, ids in self.samples.items():
                if batch not in written:
                    file.write(json.dumps({"batch": batch, "why": self.why, "sample_ids": ids}) + "\n")

    def tell(self, watch: Watch, step: int, run_dir: Path, count: int, most: int) -> None:
        """The run goes on from this step, for the `count`-th time of at most `most`."""
        first, last = self.batches
        watch.event(
            step,
            f"{self.why}: went back to step {step}, and on without batches {first} to {last}, whose sample ids are in "
            f"{run_dir / SKIPPED} (time {count} of at most {most})",
            {"rollbacks": count, "skipped_from": first, "skipped_to": last},
            rollback=self.why,
        )


class Guard:
    """Judges each step when the next one is queued, so that nothing waits for a device, and before a checkpoint."""

    def __init__(
        self, settings: TrainSection, group: Collectives, folder: RunFolder, watch: Watch, state: Mapping[str, Any] | None,
        saved: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """state: what `state` said when the checkpoint that the run continues was written; saved: returns when no checkpoint is being
        written any more, so that where the run goes back to doesn't depend on how fast a disk is."""
        self._saved = saved
        self._settings, self._group, self._folder, self._watch = settings, group, folder, watch
        state = state or {}
        self._rule = SpikeRule(settings.spike_window, settings.spike_threshold, state.get("rule"))
        # (step, its batch) as far back as trouble may begin before it is certain.
        kept = LEAD + max(WITHIN, settings.max_nonfinite_steps or 0) + 2
        self._recent: deque[tuple[int, int]] = deque(map(tuple, state.get("recent", ())), maxlen=kept)
        self._samples: dict[int, Tensor] = {}
        self._unjudged: tuple[int, HostCopy] | None = None
        if unjudged := state.get("unjudged"):
            step, loss, norm = unjudged
            numbers = {"loss": loss, "grad_norm": math.nan if norm is None else norm}
            self._unjudged = step, HostCopy({name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()})

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON holds it."""
        unjudged = None
        if self._unjudged is not None:
            step, numbers = self._unjudged
            norm = numbers["grad_norm"].item()  # NaN where DeepSpeed has none, which JSON hasn't
            unjudged = [step, numbers["loss"].item(), None if math.isnan(norm) else norm]
        return {"rule": self._rule.state(), "recent": list(self._recent), "unjudged": unjudged}

    def step(self, metrics: StepMetrics, batch: Batch) -> None:
        """After each step. Raises RollBack, and RunDiverged when the run went back as often as it may."""
        self.judge()
        number = metrics.step if batch.state is None else batch.state["batches"]
        self._recent.append((metrics.step, number))
        self._samples[number] = batch.sample_ids
        kept = {n for _, n in self._recent}
        self._samples = {n: ids for n, ids in self._samples.items() if n in kept}
        if self._settings.on_spike != "none" and metrics.pulse is not None and not metrics.skipped:
            self._unjudged = metrics.step, metrics.pulse
        if self._settings.on_nonfinite == "rollback" and self._watch.fails():
            limit = self._settings.max_nonfinite_steps or 0
            first = metrics.step - limit + 1
            why = f"steps {first} to {metrics.step} were not finite ({metrics.skip_reason})"
            if len(self._folder.lineage.skipped) < self._settings.max_rollbacks:  # otherwise the run saves and ends
                self._saved()
                # They were skipped: nothing of them, or of what came before them, has to be undone.
                self._go_back(why, first, metrics.step, otherwise="the run ends")

    def judge(self) -> None:
        """Judges the last step, if that is still to be done. Raises as `step`."""
        if self._unjudged is None:
            return
        (step, numbers), self._unjudged = self._unjudged, None
        spike = self._rule.judge(step, numbers["loss"].item(), numbers["grad_norm"].item())
        if spike is None:
            return
        self._tell(spike)
        if self._settings.on_spike == "rollback":
            self._saved()
            if len(self._folder.lineage.skipped) >= self._settings.max_rollbacks:
                raise RunDiverged(self._too_often(spike))
            self._go_back(str(spike), max(1, spike.first - LEAD), spike.last, otherwise="the run goes on")

    def _tell(self, spike: Spike) -> None:
        first, last = self._batches(spike.first, spike.last)
        self._watch.event(
            spike.last,
            f"step {spike.last}: {spike}, in batches {first} to {last}{ADVICE[self._settings.on_spike]}",
            {"spike_from": spike.first, "spike_step": spike.worst, "spike_loss": spike.loss, "spike_usual": spike.usual,
             "spike_deviations": spike.deviations, "spike_batch_from": first, "spike_batch_to": last},
        )  # fmt: skip

    def _too_often(self, spike: Spike) -> str:
        """Collective. Checkpoints may be from within the spike: a first step that deviates is saved like any other."""
        earlier = self._folder.checkpoint_before(spike.first - LEAD) or self._folder.checkpoint_before(spike.first)
        advice = "Lower optim.lr or optim.beta2, or use optim.name=stable_adamw, raise train.max_rollbacks, and"
        return (
            f"{spike}, and the run has gone back {self._settings.max_rollbacks} times already (train.max_rollbacks). "
            + (
                f"{advice} begin afresh in another folder with train.name=NAME: no checkpoint from before the spike is there"
                if earlier is None
                else f"{advice} go on from a checkpoint from before the spike with --resume {earlier}"
            )
        )

    def _go_back(self, why: str, before: int, last: int, *, otherwise: str) -> None:
        """To before step `before`, and on without the batches from there to step `last`."""
        if self._folder.checkpoint_before(before) is None:
            parent = self._folder.lineage.parent
            begun = 0 if parent is None else parent["step"]
            self._watch.message(
                f"step {last}: {why}; no checkpoint from before step {before} is there to go back to, so {otherwise}. "
                + (
                    "Lower train.save_every to have one, or raise train.keep_checkpoints"
                    if before > begun + 1
                    else f"None can be: the run began with step {begun + 1}. Lower optim.lr, raise optim.warmup_steps, or look at the data"
                )
            )
            return
        first_batch, last_batch = self._batches(before, last)
        of_ranks = self._group.all_gather_object({n: ids.tolist() for n, ids in self._samples.items()})
        samples = {n: _together([ids.get(n) for ids in of_ranks]) for n in range(first_batch, last_batch + 1)}
        raise RollBack(why, before, (first_batch, last_batch), samples)

    def _batches(self, first: int, last: int) -> tuple[int, int]:
        """The first and the last batch of these steps."""
        numbers = [number for step, number in self._recent if first <= step <= last]
        return numbers[0], numbers[-1]


def _together(of_ranks: list[list[int] | None]) -> list[int] | None:
    known = [ids for ids in of_ranks if ids is not None]
    return [sample for ids in known for sample in ids] if known else None


def without_skipped(batches: Iterator[Batch], lineage: Lineage) -> Iterator[Batch]:
    """The batches but those that the run leaves out, which are read and dropped: what follows is where it would be without that.

    What was read for them, and journaled of their shards, is counted with the next one.
    """
    dropped: list[LoadReport] = []
    for batch in batches:
        if batch.state is not None and lineage.skips(batch.state["batches"]):
            dropped.append(batch.report)
            continue
        if dropped:
            own = batch.report
            both = summed([*dropped, own])
            both = replace(both, captions=own.captions, queue_depth=own.queue_depth, epoch=own.epoch)
            batch, dropped = replace(batch, report=both), []
        yield batch
