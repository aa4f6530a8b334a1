"""A suite from its entries to its table: sets are opened, images embedded once, finished entries kept."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsclip.data import EvalDataset, build_eval_dataset
from dsclip.data.sources.storage import Storage
from dsclip.distributed import Collectives
from dsclip.errors import UserError
from dsclip.evaluate.arguments import FLAGS, NEGATIVE_KEY, check_keys, task_options
from dsclip.evaluate.feature_cache import FeatureCache
from dsclip.evaluate.opened import OpenedModel
from dsclip.evaluate.progress import EvaluationProgress
from dsclip.evaluate.results.intervals import CI95
from dsclip.evaluate.results.protocol import task_protocol, whole_protocol
from dsclip.evaluate.results.record import read_result, result_of, write_result
from dsclip.evaluate.suites.suite import Entry, Suite, file_name
from dsclip.evaluate.tasks.corrupted import Corrupted
from dsclip.evaluate.tasks.registry import TASKS, measure_task
from dsclip.evaluate.tasks.task import Task
from dsclip.files import sha256


@dataclass(frozen=True)
class Place:
    """Where a suite's sets are, and where its results go: a file an entry in `folder`/entries."""

    data_root: Path
    folder: Path
    storage: Storage


@dataclass
class _Open:
    """An entry whose set is there. file: of its result, which depends on all that decides about it."""

    entry: Entry
    path: str
    dataset: EvalDataset
    task: Task
    file: Path = Path()


def run_suite(
    suite: Suite, model: OpenedModel, cache: FeatureCache, group: Collectives, place: Place
) -> dict[str, Any]:
    """{"suite", "title", "model", "entries": [{"name", "state", …}], "protocol"}; results are on rank 0, states on all. Collective.

    state: `done`, `kept` (finished before, of the same weights, data and settings), `missing`, `unsupported` or `failed`, with
    `reason`.
    """
    rows: dict[str, dict[str, Any]] = {}
    places = suite.find(place.data_root)
    for entry in suite.entries:
        if entry.unsupported is not None:
            rows[entry.name] = {"state": "unsupported", "reason": entry.unsupported}
        elif entry.name not in places:
            rows[entry.name] = {"state": "missing", "reason": f"none of {', '.join(entry.data)}"}
    present = [(entry, places[entry.name]) for entry in suite.entries if entry.name in places]
    run = model.protocol() if group.rank == 0 else {}
    waiting = _opened(present, model, place, run, group, rows)
    finished = group.broadcast_object([_is_whole(o.file) for o in waiting] if group.rank == 0 else [])
    left = [o for o, done in zip(waiting, finished, strict=True) if not done]
    progress = EvaluationProgress(_work(left, cache) if group.rank == 0 else {"images": 0, "texts": 0}, group.rank == 0)
    embedder = replace(model.embedder, store=cache, embedded=progress.embedded, fitted=progress.fitted)
    for number, o in enumerate(waiting, start=1):
        if o not in left:
            rows[o.entry.name] = {"state": "kept"}
            continue
        progress.begin(f"{number}/{len(waiting)} {o.entry.name}")
        rows[o.entry.name] = _measured(o, replace(model, embedder=embedder), run, group, place)
        if rows[o.entry.name]["state"] == "failed":
            progress.message(f"{o.entry.name}: {rows[o.entry.name]['reason']}")
    files = {o.entry.name: o.file for o in waiting}
    entries = [_row(entry, rows[entry.name], files.get(entry.name), group.rank) for entry in suite.entries]
    return {
        "suite": suite.name,
        "title": suite.title,
        "average": suite.average,
        "model": model.name,
        "entries": entries,
        "protocol": run,
    }


def _opened(
    present: list[tuple[Entry, str]], model: OpenedModel, place: Place, run: Mapping[str, Any], group: Collectives,
    rows: dict[str, dict[str, Any]],
) -> list[_Open]:  # fmt: skip
    """The entries whose sets hold what they need; the others are put into rows."""
    sets: dict[str, EvalDataset] = {}
    waiting = []
    for entry, path in present:
        try:
            waiting.append(_open(entry, path, model, place, sets))
        except UserError as error:
            rows[entry.name] = {"state": "failed", "reason": str(error)}
    if group.rank == 0:
        for o in waiting:
            o.file = place.folder / "entries" / f"{file_name(o.entry.name)}-{_identity(o, run)}.json"
    files = group.broadcast_object([o.file for o in waiting])
    for o, file in zip(waiting, files, strict=True):
        o.file = file
    return waiting


def _open(entry: Entry, path: str, model: OpenedModel, place: Place, sets: dict[str, EvalDataset]) -> _Open:
    """The entry with its sets, which are opened once for all entries. Raises UserError when they lack what the task needs."""
    said = dict(entry.of_data)
    own_split, most = said.pop("split", None), said.pop("max_samples", None)

    def open_set(data: str, split: str | None, max_samples: int | None = None) -> EvalDataset:
        below = os.path.join(place.data_root, data)
        found = below if data != path and os.path.exists(below) else data
        known = json.dumps([found, split, max_samples, said], sort_keys=True)
        if known not in sets:
            sets[known] = build_eval_dataset(
                found, image_size=model.image_size, storage=place.storage, prepare=model.prepare, split=split,
                max_samples=max_samples, **said,
            )  # fmt: skip
        return sets[known]

    kind = TASKS[entry.task]
    arguments = argparse.Namespace(**{flag: entry.options.get(flag) for flag in FLAGS}, data=path)
    dataset = open_set(path, own_split, most)
    check_keys(dataset, path, said.get("group_key"), said.get("negative_key", NEGATIVE_KEY))
    options = task_options(arguments, kind, dataset, open_set, model.logit_scale)
    task: Task = kind.prepare(dataset, options)
    return _Open(entry, path, dataset, Corrupted(task, entry.corruptions) if entry.corruptions else task)


def _identity(o: _Open, run: Mapping[str, Any]) -> str:
    """Of the weights, the preparation, the task's settings and the files of its images: what a kept result must have in common."""
    weights = {key: value for key, value in run["model"].items() if key != "path"}
    parts = [weights, run["image"], run["text"], run["precision"], o.entry.task, task_protocol(o.task)]
    prints = [part.dataset.fingerprint() for part in o.task.images]
    return sha256(json.dumps([parts, prints], sort_keys=True).encode())[:16]


def _is_whole(file: Path) -> bool:
    """Whether a result was kept there that can be read, with its values; one that is damaged is measured again."""
    try:
        result = read_result(file).result
    except UserError:
        return False
    return bool(result["metrics"]) and {"data", "training_pairs", "bad_samples"} <= result.keys()


def _work(left: list[_Open], cache: FeatureCache) -> dict[str, int]:
    """How many images and texts are in no cache; what several entries share is counted once."""
    images = {
        cache.key_of_images(part.dataset, part.indices): len(part.indices) for o in left for part in o.task.images
    }
    texts = {cache.key_of_texts(list(o.task.texts)): len(o.task.texts) for o in left}
    return {
        kind: sum(n for key, n in keyed.items() if not cache.has(key))
        for kind, keyed in (("images", images), ("texts", texts))
    }


def _measured(o: _Open, model: OpenedModel, run: Mapping[str, Any], group: Collectives, place: Place) -> dict[str, Any]:
    """The entry's row. Features are of all ranks; the metrics, their intervals and files of rank 0 alone."""
    try:
        measured = measure_task(o.task, model.embedder)
    except UserError as error:  # of all ranks alike: features and decoded images are the same everywhere
        return {"state": "failed", "reason": str(error)}
    if group.rank == 0:
        o.file.parent.mkdir(parents=True, exist_ok=True)
        result = result_of(
            o.entry.task, measured, o.dataset, model=model.name, data=o.path, train_shards=model.train_shards, storage=place.storage
        )  # fmt: skip
        result["protocol"] = whole_protocol(run, o.task, o.dataset, o.path)
        write_result(o.file, result, measured)
    return {"state": "done"}


def _row(entry: Entry, row: Mapping[str, Any], file: Path | None, rank: int) -> dict[str, Any]:
    """What the table says of an entry; with the result that is in its file, on rank 0."""
    whole: dict[str, Any] = {"name": entry.name, "task": entry.task, "groups": list(entry.groups), **row}
    if rank != 0 or file is None or row["state"] not in ("done", "kept"):
        return whole
    result = json.loads(file.read_text(encoding="utf-8"))
    metrics = result["metrics"]
    whole |= {key: result[key] for key in ("data", "metrics", "training_pairs", "bad_samples")}
    main = entry.main or (next(iter(metrics)),)
    shares = [name for name in metrics if name + CI95 in metrics]  # all but counts
    if absent := [name for name in main if name not in shares]:
        reason = f"`main` is {absent[0]}, and the metrics of the task are {', '.join(shares)}"
        return whole | {"main": " and ".join(main), "value": None, "state": "failed", "reason": reason}
    values = [float(metrics[name]) for name in main]
    between = metrics.get(main[0] + CI95) if len(main) == 1 else None
    return whole | {"main": " and ".join(main), "value": sum(values) / len(values), "ci95": between, "file": str(file)}
