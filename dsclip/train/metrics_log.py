"""Metrics on disk: `metrics.jsonl`, one object a logged step, and the same in TensorBoard."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsclip.command_line import say
from dsclip.files import write_whole
from dsclip.train.lasting_lines import LastingLines
from dsclip.train.records import RollbackRecord, SpikeRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter  # importing it takes a second, on rank 0 alone

SUPERSEDED = "metrics.superseded.jsonl"  # lines of steps that were made again after a resume

# TensorBoard groups by what stands before the slash.
GROUPS = {
    "train": (
        "loss",
        "accuracy_image_to_text",
        "accuracy_text_to_image",
        "logit_scale",
        "lr",
        "grad_norm",
        "skipped_steps",
        "logit_bias",
        "update_rms",
        "clipped_tensors",
    ),
    "features": ("alignment", "uniformity"),
    "negatives": ("masked_negatives", "hard_negatives", "queue_length"),
    "speed": (
        "samples_per_second",
        "data_wait",
        "save_seconds",
        "write_seconds",
        "start_seconds",
        "own_seconds",
        "own_seconds_slowest",
        "slow_rank",
        "slow_seconds",
        "slow_median_seconds",
    ),
    "memory": ("memory_gb",),
    "data": ("samples_read", "bad_samples", "slow_decoded"),
}
_TAG = {name: f"{group}/{name}" for group, names in GROUPS.items() for name in names}


class MetricsLog:
    """Writes only when enabled (rank 0). After a resume at start_step, later entries of the earlier launch are put aside."""

    def __init__(self, run_dir: Path, enabled: bool, start_step: int = 0):
        self._file: LastingLines | None = None
        self._writer: SummaryWriter | None = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = Path(run_dir) / "metrics.jsonl"
        if dropped := drop_entries_after(path, start_step):
            with path.with_name(SUPERSEDED).open("a", encoding="utf-8") as file:
                file.writelines(dropped)
        self._file = LastingLines(path, say)
        _quiet_writers()
        self._writer = SummaryWriter(str(Path(run_dir) / "tb"), purge_step=start_step + 1)

    def log(
        self,
        step: int,
        scalars: dict[str, float],
        ranges: Mapping[str, list[float]] = MappingProxyType({}),
        **words: str | dict[str, str],
    ) -> None:
        """One line and one point per scalar; words go into the line only. JSON has no NaN: such numbers become null.

        ranges: {name: [lower, upper]}, two points each.
        """
        if self._file is None:
            return
        entry = {"step": step, **words} | {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        self._file.write(json.dumps(entry | dict(ranges)) + "\n")
        points = {
            _TAG.get(name) or (name if "/" in name else f"train/{name}"): value for name, value in scalars.items()
        }
        for name, (lower, upper) in ranges.items():
            points |= {f"{name}/lower": lower, f"{name}/upper": upper}
        for tag, value in points.items():
            self._show("add_scalar", tag, value, step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """The distribution of a tensor's finite values, for TensorBoard only. It never ends a run."""
        if self._writer is None:
            return
        values = values.float()
        if len(values := values[values.isfinite()]):  # TensorBoard refuses an empty histogram, and one of NaN
            self._show("add_histogram", tag, values.cpu().numpy(), step)

    def text(self, tag: str, text: str) -> None:
        """Markdown for TensorBoard's text tab."""
        self._show("add_text", tag, text, 0)

    def image(self, tag: str, image: NDArray[np.uint8], step: int) -> None:
        """A uint8 picture [H, W, 3] for TensorBoard's image tab."""
        self._show("add_image", tag, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None:
            self._file.close()
        self._show("close")

    def _show(self, method: str, *values: Any, **options: Any) -> None:
        """TensorBoard's, whose file ends where the disk was full: its thread has ended then."""
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*values, **options)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            say(
                f"TensorBoard's file can't be written ({reason}): its curves end here, those of the next launch go on; metrics.jsonl has all of them"
            )
            self._writer = None


def _quiet_writers() -> None:
    """TensorBoard's thread leaves its problem to whoever writes next, and prints a stack trace beside."""
    before = threading.excepthook
    if getattr(before, "__name__", "") == "without_writers":
        return

    def without_writers(problem: threading.ExceptHookArgs) -> None:
        if not (type(problem.thread).__name__ == "_AsyncWriterThread" and isinstance(problem.exc_value, OSError)):
            before(problem)

    threading.excepthook = without_writers


def drop_entries_after(path: Path, step: int) -> list[str]:
    """Takes out later entries, and a last line that a crash cut short, so that a resumed curve doesn't overlap; returns them."""
    if not path.is_file():
        return []
    left: list[str] = []
    dropped: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            later = json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError):
            later = True
        (dropped if later else left).append(line + "\n")
    if dropped:
        write_whole(path, "".join(left))
    return dropped


def keep_trouble(path: Path, step: int) -> None:
    """Dates the lines of spikes and rollbacks after `step` back to it, their own step in `of_step`: a run that goes back keeps them."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    write_whole(path, "".join(_dated_back(line, step) + "\n" for line in lines))


def _dated_back(line: str, step: int) -> str:
    entry = _trouble(line)
    if entry is None or entry["step"] <= step:
        return line
    return json.dumps({"of_step": entry["step"], **entry, "step": step})


def _trouble(line: str) -> dict[str, Any] | None:
    """What a line says if it is of a spike or a rollback."""
    if '"spike_from"' not in line and '"rollback"' not in line:
        return None
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:  # cut short by a crash
        return None
    return entry


def read_trouble(path: Path) -> tuple[list[SpikeRecord], list[RollbackRecord]]:
    """The spikes and the rollbacks of a run, in the order in which they came."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    spikes: list[SpikeRecord] = []
    rollbacks: list[RollbackRecord] = []
    for entry in filter(None, map(_trouble, lines)):
        step = entry.get("of_step", entry["step"])
        if "rollback" in entry:
            batches = [entry["skipped_from"], entry["skipped_to"]]
            rollbacks.append({"step": step, "batches": batches, "why": entry["rollback"]})
        else:
            steps = [entry["spike_from"], step]
            spikes.append({"steps": steps, "loss": entry["spike_loss"], "usual": entry["spike_usual"]})
    return spikes, rollbacks
