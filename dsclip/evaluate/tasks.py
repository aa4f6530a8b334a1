"""The tasks by name: what a set must hold for one, and its metrics. A new task is a file beside this one and a line in each."""

from __future__ import annotations

from typing import Literal, get_args

from dsclip.data import EvalDataset
from dsclip.evaluate.features import Embedder
from dsclip.evaluate.hard_negatives import hard_negative_samples, hard_negatives
from dsclip.evaluate.retrieval import retrieval, retrieval_samples
from dsclip.evaluate.zeroshot import zeroshot, zeroshot_prompts, zeroshot_samples

Task = Literal["zeroshot", "retrieval", "hard_negatives"]
TASKS: tuple[Task, ...] = get_args(Task)
Words = str | list[str] | None  # a file of lines, the lines, or those of the shards' manifest


def check_task(task: Task, dataset: EvalDataset, *, classnames: Words = None, templates: Words = None) -> None:
    """Raises UserError when the set lacks what the task needs."""
    if task == "zeroshot":
        names, _ = zeroshot_prompts(dataset, classnames, templates)
        zeroshot_samples(dataset, len(names))
    elif task == "retrieval":
        retrieval_samples(dataset)
    else:
        hard_negative_samples(dataset)


def run_task(
    task: Task, embedder: Embedder, dataset: EvalDataset, *, classnames: Words = None, templates: Words = None
) -> dict[str, float]:
    """{metric: value} of the model on the set. classnames, templates: of `zeroshot` alone. Collective."""
    if task == "zeroshot":
        return zeroshot(embedder, dataset, classnames=classnames, templates=templates)
    if task == "retrieval":
        return retrieval(embedder, dataset)
    return hard_negatives(embedder, dataset)
