"""The tasks by name, and one task on one set. A new task is a file beside this one and a line in `KINDS`."""

from __future__ import annotations

from dsclip.data import EvalDataset
from dsclip.evaluate.features import Embedder
from dsclip.evaluate.results.result import Measured
from dsclip.evaluate.tasks.corrupted import Corrupted
from dsclip.evaluate.tasks.hard_negatives import HARD_NEGATIVES
from dsclip.evaluate.tasks.hard_positives import HARD_POSITIVES
from dsclip.evaluate.tasks.knn import KNN
from dsclip.evaluate.tasks.multilabel import MULTI_LABEL
from dsclip.evaluate.tasks.probe import LINEAR_PROBE
from dsclip.evaluate.tasks.retrieval import RETRIEVAL
from dsclip.evaluate.tasks.task import DEFAULTS, Embedded, Options, Task
from dsclip.evaluate.tasks.winoground import WINOGROUND
from dsclip.evaluate.tasks.zeroshot import ZEROSHOT

KINDS = (ZEROSHOT, RETRIEVAL, HARD_NEGATIVES, HARD_POSITIVES, WINOGROUND, LINEAR_PROBE, KNN, MULTI_LABEL)
TASKS = {kind.name: kind for kind in KINDS}
IN_TRAINING = ("zeroshot", "retrieval", "hard_negatives")  # those with a key `eval.NAME_shards` in the recipe


def prepare_task(name: str, dataset: EvalDataset, options: Options = DEFAULTS) -> Task:
    """The task on the set. Raises UserError when the set lacks what it needs."""
    return TASKS[name].prepare(dataset, options)


def measure_task(task: Task, embedder: Embedder) -> Measured:
    """What the model does in a task that is prepared, the same on every number of ranks. Collective."""
    images = (Embedded(*embedder.images(part.dataset, part.indices)) for part in task.images)
    if isinstance(task, Corrupted):
        return task.measure(images, embedder.texts(list(task.texts)))
    embedded = list(images)
    return task.measure(embedded, embedder.texts(list(task.texts)))


def run_task(name: str, embedder: Embedder, dataset: EvalDataset, options: Options = DEFAULTS) -> Measured:
    """Both in one. Raises UserError when the set lacks what the task needs. Collective."""
    return measure_task(prepare_task(name, dataset, options), embedder)
