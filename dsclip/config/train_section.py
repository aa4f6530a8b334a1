"""The recipe's section on the run itself: its length, its folder, and what it does when something goes wrong."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from dsclip.config.kinds import STRICT, Count, NotNegative, Positive, PositiveFloat, Rule

FolderName = Annotated[
    str, Rule(lambda name: bool(re.fullmatch(r"\w[\w.+-]*", name)), "letters, digits and . _ - + only")
]


@dataclass(frozen=True, config=STRICT)
class TrainSection:
    """The run: its length, its folder and how often it reports."""

    name: FolderName = "run"
    """Of the run: its folder's name."""
    output: str = "runs"
    """Folder of the runs' folders."""
    steps: Positive = 10_000
    """Optimizer steps of the whole run."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Of the weights, the data order, augmentation and patch dropout."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl and TensorBoard scalars."""
    save_every: Positive | None = None
    """Steps between checkpoints; the last step always saves."""
    save_minutes: PositiveFloat | None = 30.0
    """Minutes between checkpoints, looked at when metrics are logged; null: by steps only."""
    max_nonfinite_steps: Positive | None = 10
    """Steps in a row skipped because a number wasn't finite, after which the run saves and fails; null: it goes on."""
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """What follows then: the run ends, or goes [back](training.md#going-back) to the last checkpoint before these steps, if there is one."""
    on_spike: Literal["none", "warn", "rollback"] = "warn"
    """When the loss [jumps](training.md#loss-spikes): `warn`: a line says so; `rollback`: the run also goes back to the last checkpoint before it, \
and on without the batches that led to it."""
    spike_threshold: PositiveFloat = 8.0
    """Robust standard deviations above the median of the last steps from which on a loss, or a gradient norm, deviates."""
    spike_window: Annotated[int, Field(ge=10, le=10_000)] = 100
    """The last steps that are compared with; none is judged before there are so many."""
    max_rollbacks: Positive = 5
    """How often a run may go back, over all its launches; the next time it ends."""
    replica_check_every: Count = 100
    """Steps between comparisons of what must be [equal on all ranks](training.md#ranks-that-differ): a difference ends the run; 0: never."""
    hang_timeout: NotNegative = 15.0
    """Minutes without progress after which ranks say where they are and the job ends; four times as many for its first step and for saving; 0: never."""
    save_in_background: Literal["auto", "on", "off"] = "auto"
    """Copy what is saved on the way to host memory and let a process of each rank write it while training goes on; `auto`: on a GPU."""
    keep_checkpoints: Positive = 3
    """The newest ones that stay."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks and of the images' embedding; `auto`: on a GPU, where there is a C compiler."""
    export_hf: bool = True
    """Convert the last checkpoint to a HuggingFace folder."""


def saves_in_background(setting: str, device: str) -> bool:
    """Whether checkpoints on the way are written while training goes on. setting: `save_in_background`; device: cuda or cpu."""
    return setting == "on" or (setting == "auto" and device == "cuda")
