"""What the command line says of a task: `Options`, with the sets that probes train on."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from dsclip.data import EvalDataset
from dsclip.errors import NoSuchSplit, UserError
from dsclip.evaluate.tasks.logistic import FITS
from dsclip.evaluate.tasks.task import Options, TaskKind
from dsclip.evaluate.tasks.templates import template_sets

OpenSet = Callable[[str, str | None], EvalDataset]  # data, all of it, and its split
VALIDATION = ("val", "validation", "valid")  # what the split is called, whichever there is
FLAGS = {
    "classnames": "--classnames", "templates": "--templates", "train": "--train-data", "validation": "--validation-data", "shots": "--shots",
    "seeds": "--seeds", "solver": "--solver", "neighbours": "--neighbours", "cache_weight": "--cache-weight",
    "cache_sharpness": "--cache-sharpness",
}  # fmt: skip
NEGATIVE_KEY = "negatives"
REAL = ("cache_weight", "cache_sharpness")


def add_task_options(p: argparse.ArgumentParser) -> None:
    """Adds them; each is None where it isn't given."""
    p.add_argument(
        "--classnames", help="of tasks with prompts: file with one class name a line (default: those of the data)"
    )
    p.add_argument(
        "--templates",
        help=f"of tasks with prompts: a file of sentences with {{}}, or one of {', '.join(template_sets())} (default: those of the data)",
    )
    p.add_argument(
        "--train-data",
        dest="train",
        help="linear_probe, knn, tip_adapter, tfup: training set, its split train where it has splits (default: the data's)",
    )
    p.add_argument(
        "--validation-data",
        dest="validation",
        help="linear_probe: for the regularisation, its split val where it has splits (default: training samples)",
    )
    p.add_argument(
        "--shots",
        type=int,
        nargs="+",
        metavar="K",
        help="training samples a class (default: linear_probe all, tip_adapter 16)",
    )
    p.add_argument("--seeds", type=int, help="linear_probe, tip_adapter: draws of the shots (default: 3)")
    p.add_argument("--solver", choices=list(FITS), help="linear_probe: adamw is CLIP_benchmark's (default: lbfgs)")
    p.add_argument(
        "--cache-weight",
        type=float,
        help="tip_adapter, tfup: alpha, of the cache's votes beside zero-shot logits (default: 1, 0.3)",
    )
    p.add_argument(
        "--cache-sharpness", type=float, help="tip_adapter, tfup: beta of the cache's votes (default: 5.5, 1)"
    )
    p.add_argument(
        "--corruption", nargs="+", metavar="NAME[:SEVERITY]",
        help="the same task on corrupted pictures too: names as in ImageNet-C, such as fog or jpeg_compression:3, or all (default: none; severities 1 to 5)",
    )  # fmt: skip
    p.add_argument("--neighbours", type=int, help="knn: that vote (default: 20)")


def task_options(
    arguments: argparse.Namespace, kind: TaskKind, test: EvalDataset, open_set: OpenSet, logit_scale: float | None
) -> Options:
    """The options of a task on a test set. Raises UserError for one that the task doesn't read, for numbers out of their bounds, and
    for a task that would train on test images."""
    given = {name: getattr(arguments, name) for name in FLAGS if getattr(arguments, name) is not None}
    for name, value in given.items():
        if name not in kind.reads:
            raise UserError(f"{FLAGS[name]} says nothing to the task {kind.name}; leave it out")
        numbers = value if isinstance(value, list) else [value]
        if name in REAL:
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(f"{FLAGS[name]} is {value}; it must be a number, 0 or more")
        elif any(isinstance(number, int) and number < 1 for number in numbers):
            raise UserError(f"{FLAGS[name]} must be 1 or more")
    if "train" in kind.reads:
        named = given.get("train")
        given["train"] = _part(named, ("train",), open_set) if named else _own_training(arguments.data, open_set)
        if kind.reads_labels:
            _check_apart(given["train"], test, f"--train-data {named or arguments.data}")
    if "validation" in given:
        named = given["validation"]
        given["validation"] = _part(named, VALIDATION, open_set)
        _check_apart(given["validation"], test, f"--validation-data {named}")
    if "shots" in given:
        given["shots"] = tuple(given["shots"])
    elif "seeds" in given:
        raise UserError("--seeds counts draws of few shots; give --shots too")
    return Options(**given, logit_scale=logit_scale)


def check_keys(dataset: EvalDataset, data: str, group_key: str | None, negative_key: str) -> None:
    """Raises UserError for a key that was asked for and that no sample of the test set has."""
    asked = {
        "group key": (group_key, any(group is not None for group in dataset.groups)),
        "key of hard negatives": (None if negative_key == NEGATIVE_KEY else negative_key, any(dataset.negatives)),
    }
    for what, (key, is_there) in asked.items():
        if key is not None and not is_there:
            place = ".npy" if key.startswith("npy:") else ".json"
            raise UserError(
                f"no sample of {data} has the {what} {key!r}; look into a sample's {place}, or leave it out"
            )


def _part(data: str, names: tuple[str, ...], open_set: OpenSet) -> EvalDataset:
    """The split of one of these names, or all of a set that isn't split. Raises UserError where it is split into others."""
    try:
        return open_set(data, names[0])
    except NoSuchSplit as error:
        if not error.splits:
            return open_set(data, None)
        if (other := next((name for name in names if name in error.splits), None)) is None:
            raise
        return open_set(data, other)


def _check_apart(fitted_on: EvalDataset, test: EvalDataset, where: str) -> None:
    if shared := test.shared_images(fitted_on):
        raise UserError(
            f"{where}: {shared} of the {len(test)} test images are among its images; measure a probe on images that it doesn't "
            "train on (other data, or another --split)"
        )


def _own_training(data: str, open_set: OpenSet) -> EvalDataset:
    try:
        return open_set(data, "train")
    except UserError as error:
        raise UserError(f"no training samples in {data} ({error}); give --train-data") from error
