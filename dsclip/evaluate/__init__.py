"""Evaluation: zero-shot classification, retrieval, hard negatives; the same on any number of ranks."""

from dsclip.evaluate.features import Embedder
from dsclip.evaluate.results.intervals import table, with_intervals
from dsclip.evaluate.results.result import Measured, Outcomes
from dsclip.evaluate.tasks.registry import IN_TRAINING, TASKS, measure_task, prepare_task, run_task
from dsclip.evaluate.tasks.retrieval import measure_retrieval
from dsclip.evaluate.tasks.task import Options, Task, TaskKind
from dsclip.evaluate.tasks.zeroshot import measure_classification

__all__ = [
    "Embedder", "IN_TRAINING", "Measured", "Options", "Outcomes", "TASKS", "Task", "TaskKind", "measure_classification",
    "measure_retrieval", "measure_task", "prepare_task", "run_task", "table", "with_intervals",
]  # fmt: skip
