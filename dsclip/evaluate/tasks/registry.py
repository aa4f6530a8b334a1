"""The tasks by name, and one task on one set. A new task is a file beside this one and a line in `KINDS`."""

from __future__ import annotations

from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.errors import UserError
from dsclip.evaluate.features import Embedder
from dsclip.evaluate.results.result import Measured
from dsclip.evaluate.tasks.associations import ASSOCIATIONS
from dsclip.evaluate.tasks.bags import BAG_RETRIEVAL
from dsclip.evaluate.tasks.cache import TFUP, TIP_ADAPTER
from dsclip.evaluate.tasks.corrupted import Corrupted
from dsclip.evaluate.tasks.hard_negatives import HARD_NEGATIVES
from dsclip.evaluate.tasks.hard_positives import HARD_POSITIVES
from dsclip.evaluate.tasks.knn import KNN
from dsclip.evaluate.tasks.multilabel import MULTI_LABEL
from dsclip.evaluate.tasks.probe import LINEAR_PROBE
from dsclip.evaluate.tasks.retrieval import RETRIEVAL
from dsclip.evaluate.tasks.task import DEFAULTS, Embedded, Fitting, Options, Task
from dsclip.evaluate.tasks.winoground import WINOGROUND
from dsclip.evaluate.tasks.zeroshot import ZEROSHOT

KINDS = (
    ZEROSHOT, RETRIEVAL, HARD_NEGATIVES, HARD_POSITIVES, WINOGROUND, LINEAR_PROBE, KNN, MULTI_LABEL, TIP_ADAPTER, TFUP, BAG_RETRIEVAL,
    ASSOCIATIONS,
)  # fmt: skip
TASKS = {kind.name: kind for kind in KINDS}
IN_TRAINING = ("zeroshot", "retrieval", "hard_negatives")  # those with a key `eval.NAME_shards` in the recipe


def prepare_task(name: str, dataset: EvalDataset, options: Options = DEFAULTS) -> Task:
    """The task on the set. Raises UserError when the set lacks what it needs."""
    return TASKS[name].prepare(dataset, options)


def measure_task(task: Task, embedder: Embedder) -> Measured:
    """What the model does in a task that is prepared, the same on every number of ranks. Collective."""
    text = embedder.texts(list(task.texts))
    if isinstance(task, Fitting) and embedder.fitted is not None:
        task.fitted = embedder.fitted
    images = (_comparable(Embedded(*embedder.images(part.dataset, part.indices)), text) for part in task.images)
    if isinstance(task, Corrupted):  # one corruption's features at a time
        return task.measure(images, text)
    return task.measure(list(images), text)


def _comparable(images: Embedded, text: Tensor) -> Embedded:
    """The images' features. Raises UserError when those of texts are of another width, as an adapter's may be."""
    if len(text) and len(images.features) and images.features.shape[1] != text.shape[1]:
        raise UserError(
            f"the model's image features have {images.features.shape[1]} numbers and its text features {text.shape[1]}: "
            "they can't be compared"
        )
    return images


def run_task(name: str, embedder: Embedder, dataset: EvalDataset, options: Options = DEFAULTS) -> Measured:
    """Both in one. Raises UserError when the set lacks what the task needs. Collective."""
    return measure_task(prepare_task(name, dataset, options), embedder)
