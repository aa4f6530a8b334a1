"""Evaluation: zero-shot classification, retrieval, hard negatives; the same on any number of ranks."""

from dsclip.evaluate.features import Embedder
from dsclip.evaluate.hard_negatives import hard_negatives
from dsclip.evaluate.retrieval import retrieval, retrieval_metrics
from dsclip.evaluate.tasks import TASKS, check_task, run_task
from dsclip.evaluate.zeroshot import classification_metrics, zeroshot

__all__ = [
    "Embedder", "TASKS", "check_task", "classification_metrics", "hard_negatives", "retrieval", "retrieval_metrics", "run_task",
    "zeroshot",
]  # fmt: skip
