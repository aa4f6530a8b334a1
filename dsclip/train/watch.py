"""What people see while a run goes on: the progress line, TensorBoard, metrics.jsonl. Only rank 0 shows anything."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from dsclip.config import dump_recipe
from dsclip.data.batch import Batch
from dsclip.data.shards.overlap import ALL, PART
from dsclip.errors import RunDiverged
from dsclip.evaluate.results.intervals import table
from dsclip.files import sha256
from dsclip.train.counters import Counters, Tally
from dsclip.train.hangs import Heart
from dsclip.train.metrics_log import MetricsLog
from dsclip.train.progress import Progress
from dsclip.train.records import Counts, Results, Totals
from dsclip.train.resume import Resumed
from dsclip.train.stragglers import OwnTime, Stragglers

if TYPE_CHECKING:
    from dsclip.engine.contrastive import ContrastiveEngine  # importing it takes DeepSpeed's seconds
    from dsclip.engine.step_metrics import StepMetrics
    from dsclip.train.inputs import RunInputs

SKIPPED_AT_THE_END = 10  # steps; a run that ends with as many skipped in a row has diverged


@dataclass
class Window:
    """Since the last logged step: seconds, of which the step waited for data, and what the loader's workers did."""

    steps: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    decoded: int = 0  # samples
    decoding_s: float = 0.0  # of all workers


# What a rank journaled since the last time, the sample ids of its batch, and its own time.
RankLog = tuple[list[dict[str, str]], bytes, OwnTime]


class Watch:
    """Collects each step's metrics and passes them on. `step` is collective where it logs (counts are summed)."""

    def __init__(self, inputs: RunInputs, engine: ContrastiveEngine, resumed: Resumed, tally: Tally | None = None):
        """tally: what this launch did before it went back, None before it has."""
        self._group, self._settings = engine.group, inputs.recipe.train
        self._global_batch = inputs.recipe.batch.global_batch_size
        shown = self._group.rank == 0
        self._log = MetricsLog(inputs.run_dir, shown, start_step=engine.step)
        self._progress = Progress(self._settings.steps, engine.step, shown)
        self._window = Window()
        self._stragglers = Stragglers()
        self.heart = Heart(self._settings.hang_timeout)
        self.tally = tally or Tally(Counters(self._group, resumed.counters, resumed.record), engine.step)
        self._counters = self.tally.counters
        self._journal: list[dict[str, str]] = []
        self._journal_path = inputs.run_dir / "data_journal.jsonl"
        self._skipped_in_a_row = 0
        self._memory_gb: float | None = None  # before evaluation and conversion add theirs
        self._steps = 0  # since the launch began or last went back
        self._start_seconds: float | None = None  # from the start of this process to the end of its first step
        self._unwritten: Callable[[], None] | None = None  # the logged step whose numbers may still be computed
        if shown:
            self._log.text("recipe", f"```yaml\n{dump_recipe(inputs.recipe)}\n```")
            self._log.text("deepspeed", f"```json\n{json.dumps(inputs.ds_config, indent=2)}\n```")

    def logs(self, step: int) -> bool:
        """Whether this step is one of those that are logged."""
        return step % self._settings.log_every == 0 or step == self._settings.steps

    def step(self, metrics: StepMetrics, batch: Batch, waited_s: float, seconds: float, forward_s: float = 0.0) -> None:
        """One optimizer step: shown every time, logged every `train.log_every` steps.

        A logged step is shown and written when the next one is queued, or by `flush`: until then a GPU may compute it.
        seconds: of the step, in which it waited_s for data; forward_s: of the engine, before the first collective.
        """
        self.flush()
        self._stragglers.add(waited_s + forward_s, seconds)
        window, report = self._window, batch.report
        window.steps += 1
        window.seconds += seconds
        window.waited_s += waited_s
        window.decoded += report.read
        window.decoding_s += report.seconds
        self.tally.seconds += seconds
        self.tally.steps += 1
        self._steps += 1
        if self.tally.steps == 1:
            self._start_seconds = time.time() - psutil.Process().create_time()
        if metrics.skipped and not self._skipped_in_a_row:
            self.message(f"step {metrics.step}: skipped, not finite: {metrics.skip_reason}")
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if metrics.skipped else 0
        self._memory_gb = peak_memory_gb()
        self._counters.add(report, metrics.skipped)
        self._journal += report.journal
        timing: dict[str, float | None] = {
            "samples_per_second": window.steps * self._global_batch / window.seconds,
            "data_wait": window.waited_s / window.seconds,
            "skipped_steps": self._counters.skipped_steps,
            "epoch": report.epoch,
            "data_queue_depth": report.queue_depth,
            "decoded_per_worker_second": window.decoded / window.decoding_s if window.decoding_s else None,
        }
        if not self.logs(metrics.step):
            self._show(metrics, timing)
            return
        ids = batch.sample_ids.cpu().numpy().tobytes()
        logged = self._counters.gather((self._journal, ids, self._stragglers.taken()))
        self._journal, self._window = [], Window()
        self._unwritten = partial(self._show, metrics, timing, logged)

    def flush(self) -> None:
        """Shows and writes what waits for the device."""
        unwritten, self._unwritten = self._unwritten, None
        if unwritten is not None:
            unwritten()

    def _show(self, metrics: StepMetrics, timing: dict[str, float | None], logged: list[RankLog] | None = None) -> None:
        shown = {
            "loss": metrics.loss,
            "accuracy": metrics.accuracy_image_to_text,
            "logit_scale": metrics.logit_scale,
            "lr": metrics.lr,
            "grad_norm": metrics.grad_norm,
            "bad_samples": sum(self._counters.total["bad_samples"].values()),
            **timing,
        }
        self._progress.update(metrics.step, shown)
        if logged is not None:
            self._write(metrics.step, metrics, shown, logged)

    def _write(self, step: int, metrics: StepMetrics, shown: dict[str, float | None], ranks: list[RankLog]) -> None:
        total, batch_hash = self._counters.total, sha256(ids for _, ids, _ in ranks)[:16]
        bad, read = total["bad_samples"], total["samples_read"]
        for journal, *_ in ranks:
            self._write_journal(step, journal)
        scalars: dict[str, float] = {
            "samples": step * self._global_batch,
            **{k: v for k, v in shown.items() if k not in ("accuracy", "bad_samples") and v is not None},
            "accuracy_image_to_text": metrics.accuracy_image_to_text,
            "accuracy_text_to_image": metrics.accuracy_text_to_image,
            "samples_read": read,
            "slow_decoded": total["slow_decoded"],
            "bad_samples": sum(bad.values()),
            "bad_sample_rate": sum(bad.values()) / max(1, read),
            **loss_scalars(metrics),
        }
        if self._memory_gb is not None:
            scalars["memory_gb"] = self._memory_gb
        if self._start_seconds is not None:  # once a launch
            scalars["start_seconds"], self._start_seconds = round(self._start_seconds, 1), None
        if metrics.features is not None:
            self._log.histogram("similarity/positive", metrics.features.positive, step)
            self._log.histogram("similarity/negative", metrics.features.negative, step)
        scalars |= {f"bad_samples/{reason}": n for reason, n in bad.items()}
        own, slow = self._stragglers.judge([time for *_, time in ranks])
        scalars |= own
        # Of the sample ids of the whole global batch: equal in runs that saw the same data.
        words = {} if metrics.skip_reason is None else {"skip_reason": metrics.skip_reason}
        if slow is not None:
            scalars |= {"slow_rank": slow.rank, "slow_seconds": slow.own_s, "slow_median_seconds": slow.median_s}
            words["slow_host"] = slow.host
            self.message(f"step {step}: {slow}")
        self._log.log(step, scalars, {}, batch_hash=batch_hash, **words)

    def _write_journal(self, step: int, journal: list[dict[str, str]]) -> None:
        """Shards that failed, once each and worker: what was left out of the run."""
        if self._group.rank or not journal:
            return
        with self._journal_path.open("a", encoding="utf-8") as file:
            for entry in journal:
                file.write(json.dumps({"step": step, **entry}) + "\n")
                self.message(f"shard {entry['shard']}: {entry['what']} ({entry['detail']})")

    def evaluated(self, step: int, results: Results, names: dict[str, str]) -> None:
        """Evaluation results, to the log and above the progress line. names: {task: its data}, see `data_name`."""
        self.flush()
        if results:
            named = {
                f"{evaluation_tag(names[task])}/{task}/{k}": v
                for task, values in results.items()
                for k, v in values.items()
            }
            scalars = {name: v for name, v in named.items() if not isinstance(v, list)}
            ranges = {name: v for name, v in named.items() if isinstance(v, list)}
            self._log.log(step, scalars, ranges, eval_names=names)
            self._log.text("eval/data", "\n".join(f"* {task}: {name}" for task, name in names.items()))
        for task, values in results.items():
            shares = table({name: value for name, value in values.items() if not isinstance(value, int)}, digits=1)
            shown = ", ".join(
                f"{name} {value} ({between})" if between else f"{name} {value}" for name, value, between in shares
            )
            self.message(f"step {step}: {task} on {names[task]}: {shown}")

    def event(self, step: int, text: str, scalars: Mapping[str, float] = MappingProxyType({}), **words: str) -> None:
        """What happened after a step beside the training, to the log and in a line above the progress bar."""
        self.flush()
        self._log.log(step, dict(scalars), {}, **words)
        self.message(text)

    def picture(self, tag: str, image: NDArray[np.uint8], step: int) -> None:
        """A uint8 picture [H, W, 3] for TensorBoard's image tab."""
        self._log.image(tag, image, step)

    def message(self, text: str) -> None:
        """A line above the progress bar."""
        self.flush()
        self._progress.message(text)

    def fails(self) -> bool:
        """Whether `train.max_nonfinite_steps` steps in a row were skipped; the same on all ranks."""
        limit = self._settings.max_nonfinite_steps
        return limit is not None and self._skipped_in_a_row >= limit

    def check_applied(self) -> None:
        """Raises RunDiverged, on all ranks alike, when steps were made and none, or none of the last, was applied."""
        if not self.fails() and (not self._steps or self._skipped_in_a_row < min(self._steps, SKIPPED_AT_THE_END)):
            return
        whole = self._skipped_in_a_row == self._steps
        raise RunDiverged(
            f"{'all' if whole else 'the last'} {self._skipped_in_a_row} steps were skipped, because something in them was "
            "not finite (`skip_reason` in metrics.jsonl says what); the weights are those from before, and saved. Lower optim.lr, "
            "or look at the data, and go on with --resume auto, or from an earlier checkpoint with --resume PATH"
        )

    def totals(self) -> Totals:
        """Collective. What the summary says about the run as a whole, and about this launch."""
        tally = self.tally
        return {
            "samples_per_second": tally.steps * self._global_batch / tally.seconds if tally.seconds else None,
            "memory_gb": self._memory_gb,
            "launch": {
                "from_step": tally.from_step,
                "steps": tally.steps,
                "seconds": round(self._counters.launch_seconds(), 1),
            },
            **self.counted(),
        }

    def counted(self) -> Counts:
        """Collective. What a checkpoint keeps of the counts."""
        self.flush()  # with the counts of its own step
        self._counters.gather(None)
        return self._counters.total

    def close(self) -> None:
        """Ends the progress line and flushes the logs."""
        self.flush()
        self._progress.close()
        self._log.close()


def evaluation_tag(name: str) -> str:
    """Where results on this data are logged: those on training pairs in a group that says so."""
    return next((f"eval_on_{note.replace(' ', '_')}" for note in (PART, ALL) if name.endswith(f"({note})")), "eval")


def loss_scalars(metrics: StepMetrics) -> dict[str, float]:
    """What TensorBoard shows of the loss beyond its value, and of the optimizer; only what the run has."""
    shown = {"logit_bias": metrics.logit_bias, **metrics.optimizer}
    if metrics.features is not None:
        shown |= {"alignment": metrics.features.alignment.item(), "uniformity": metrics.features.uniformity.item()}
    counts = ("masked_negatives", "hard_negatives", "queue_length")
    shown |= {name: getattr(metrics, name) for name in counts if getattr(metrics, name)}
    shown |= {f"terms/{name}": value for name, value in metrics.terms.items()}
    shown |= {f"experts/{block}": share for block, share in metrics.experts.items()}
    return {name: value for name, value in shown.items() if value is not None}


def peak_memory_gb() -> float:
    """Peak memory of this process so far, in 10⁹ bytes: of the GPU where there is one, otherwise resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
