"""Suites: YAML files of entries, each a task on a set, with where the set is expected below a folder of the user's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dsclip.data.corruptions.corruption import Corruption, parse_corruptions
from dsclip.data.layouts.hf_dataset import PREFIX
from dsclip.data.shards.specification import DEMO, resolve_shards
from dsclip.data.sources.storage import is_remote
from dsclip.errors import UserError, did_you_mean
from dsclip.evaluate.arguments import FLAGS
from dsclip.evaluate.suites.fine_tune import FineTune, read_fine_tune
from dsclip.evaluate.suites.values import checked_values
from dsclip.evaluate.tasks.registry import TASKS

PACKAGED = Path(__file__).parent
OF_THE_TASK = tuple(FLAGS)  # what an entry may say of its task
OF_THE_DATA = (
    "caption_key",
    "group_key",
    "negative_key",
    "split",
    "images",
    "max_samples",
)  # and of its set, see `build_eval_dataset`
OF_THE_ENTRY = ("name", "task", "data", "main", "groups", "unsupported", "corruption", "fine_tune")


@dataclass(frozen=True)
class Entry:
    """A task on a set. data: places where the set may be, the first that exists counts; main: the metric that the table shows, or several, whose mean it shows.

    corruptions: that it is measured under too. groups: averages that it is a part of, beside that of all. unsupported: why it can't be measured here (task is "" then).
    options: of the task, as the command line has them (`arguments.FLAGS`); of_data: of `build_eval_dataset`. fine_tune: what the model
    is trained on before.
    """

    name: str
    task: str
    data: tuple[str, ...]
    main: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    unsupported: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    of_data: Mapping[str, Any] = field(default_factory=dict)
    corruptions: tuple[Corruption, ...] = ()
    fine_tune: FineTune | None = None

    def find(self, data_root: Path) -> str | None:
        """The first of its places that exists; addresses, names of the library `datasets` and the embedded set count as existing."""
        for place in self.data:
            if place in DEMO or is_remote(place) or place.startswith(PREFIX):
                return place
            path = os.path.join(data_root, os.path.expanduser(place))
            if os.path.exists(path) or names_shards(path):
                return path
        return None


def names_shards(path: str) -> bool:
    """Whether a folder, file, glob or brace expression names any."""
    try:
        return bool(resolve_shards(path))
    except UserError:
        return False


@dataclass(frozen=True)
class Suite:
    """average: what the mean of all main metrics is called."""

    name: str
    title: str
    average: str
    entries: tuple[Entry, ...]

    def find(self, data_root: Path) -> dict[str, str]:
        """{entry: where its set is} of the entries that can be measured."""
        measured = [entry for entry in self.entries if entry.unsupported is None]
        return {entry.name: place for entry in measured if (place := entry.find(data_root)) is not None}


def suite_names() -> list[str]:
    """Of those that come with dsclip."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """A suite that comes with dsclip, or a YAML file. Raises UserError that names file and entry."""
    path = PACKAGED / f"{name}.yaml"
    if name not in suite_names():
        path = Path(name)
        if not path.is_file():
            raise UserError(f"there is no suite {name}: give one of {', '.join(suite_names())}, or a YAML file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list) or not content["entries"]:
        raise UserError(f"{path}: a suite has `entries`, a list of {{name, task, data}}")
    _check_keys(content, ("title", "average", "entries"), str(path))
    entries = tuple(
        _entry(values, f"{path}, entry {i + 1}", path.parent) for i, values in enumerate(content["entries"])
    )
    names = [entry.name for entry in entries]
    if repeated := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"{path} has several entries with the name {repeated!r}; the table needs different ones")
    return Suite(
        path.stem, str(content.get("title", path.stem)), str(content.get("average", "mean of main metrics")), entries
    )


def present_entries(suite: Suite, data_root: Path) -> dict[str, str]:
    """{entry: where its set is} of the entries that can be measured. Raises UserError when there is none."""
    found = suite.find(data_root)
    if all(entry.unsupported is not None for entry in suite.entries):
        raise UserError(f"the suite {suite.name} has nothing to measure: every entry is marked as `unsupported`")
    if not found:
        looked = ", ".join(entry.data[0] for entry in suite.entries[:3])
        raise UserError(
            f"none of the {len(suite.entries)} sets of the suite {suite.name} is in {data_root} (it looks for {looked}, …); "
            "say where they are with --data-root"
        )
    return found


def file_name(text: str) -> str:
    """The text with whatever a file's name had better not have as `_`."""
    return re.sub(r"[^\w.+-]+", "_", text)


def _check_keys(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"{where}: there is no key `{key}`.{did_you_mean(str(key), list(known))}")


def _entry(values: Any, where: str, folder: Path) -> Entry:
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r}; it must be {{name: …, task: …, data: …}}")
    _check_keys(values, (*OF_THE_ENTRY, *OF_THE_TASK, *OF_THE_DATA), where)
    values = checked_values(values, where)
    data = _words(values.get("data"), "data", where)
    if not data:
        raise UserError(f"{where} has no `data`: where its set is, below --data-root")
    unsupported, task = values.get("unsupported"), values.get("task", "")
    if unsupported is None and task not in TASKS:
        raise UserError(f"{where}: task {task!r} is none of {', '.join(TASKS)}.{did_you_mean(str(task), list(TASKS))}")
    said = {key: values[key] for key in OF_THE_TASK if values.get(key) is not None}
    if unsupported is None and (unread := [key for key in said if key not in TASKS[task].reads]):
        raise UserError(f"{where}: the task {task} doesn't read `{unread[0]}`")
    beside = {key: _beside(value, folder) for key, value in said.items()}
    of_data = {key: values[key] for key in OF_THE_DATA if values.get(key) is not None}
    return Entry(
        str(values.get("name", data[0])), str(task), data, _words(values.get("main"), "main", where),
        _words(values.get("groups"), "groups", where), unsupported, beside, of_data, _corruptions(values, where),
        read_fine_tune(values.get("fine_tune"), where, folder),
    )  # fmt: skip


def _corruptions(values: Mapping[str, Any], where: str) -> tuple[Corruption, ...]:
    try:
        return parse_corruptions(_words(values.get("corruption"), "corruption", where))
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from error


def _words(value: Any, key: str, where: str) -> tuple[str, ...]:
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(word, str) for word in found):
        raise UserError(f"{where}: `{key}` is {value!r}; it must be a text, or a list of texts")
    return tuple(found)


def _beside(value: Any, folder: Path) -> Any:
    """A file that is named relative to the suite's, by its path."""
    return str(folder / value) if isinstance(value, str) and (folder / value).is_file() else value
