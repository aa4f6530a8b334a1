"""What a run writes down of itself, as JSON holds it: counts in its checkpoints, and the summary at its end."""

from __future__ import annotations

from typing import Any, TypedDict

# {task: {metric: value, metric_ci95: [lower, upper]}}
Results = dict[str, dict[str, float | list[float]]]


class Resume(TypedDict):
    """A launch that continued a checkpoint. changes: {key: [value in the checkpoint, value from then on]}."""

    step: int
    changes: dict[str, list[Any]]


class Counts(TypedDict):
    """Over all ranks and launches. bad_samples by reason; slow_decoded: JPEGs that only Pillow could read; seconds of training."""

    samples_read: int
    bad_samples: dict[str, int]
    slow_decoded: int
    skipped_steps: int
    seconds: float
    resumes: list[Resume]


class Launch(TypedDict):
    """This launch alone."""

    from_step: int
    steps: int
    seconds: float


class Totals(Counts):
    """What the summary says of the run as a whole, and of this launch. memory_gb: the peak of rank 0, in 10⁹ bytes."""

    samples_per_second: float | None
    memory_gb: float | None
    launch: Launch


class EvaluationError(TypedDict):
    """An evaluation that gave no results."""

    step: int
    error: str


class SpikeRecord(TypedDict):
    """A loss that jumped in steps [first, last]. usual: what it was before."""

    steps: list[int]
    loss: float
    usual: float


class RollbackRecord(TypedDict):
    """The run went back to this step, and on without batches [first, last]."""

    step: int
    batches: list[int]
    why: str


class Summary(Totals):
    """`summary.json`. model: the preset. eval_data: {task: shards}; eval_names: {task: its data, and whether they are training pairs}.

    convertible: whether transformers has such a model.
    """

    model: str
    train_shards: str | list[str] | None
    global_batch_size: int
    steps: int
    samples: int
    loss: float | None
    eval: Results
    evaluation_errors: list[EvaluationError]
    eval_data: dict[str, str | list[str]]
    eval_names: dict[str, str]
    checkpoint: str
    hf_export: str | None
    convertible: bool
    planned_memory_gb: float
    spikes: list[SpikeRecord]
    rollbacks: list[RollbackRecord]
    left_out_batches: list[list[int]]
