"""Points of a scaling study: what a run cost, and how wrong it was on a test; read from CSV.

The columns are those of the study's released results (Cherti et al. 2023): what a run was stands in the columns of `KNOWN`,
and every other column is a metric. One row is one run on one test set; an empty cell was not measured.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from dsclip.errors import UserError

PUBLISHED = ("published", "published2025")  # sources that come with dsclip: their CSV files' names
NUMBERS = ("samples_seen", "gmacs_per_sample", "gmacs_total", "train_samples", "lr", "seconds", "seed", "steps")
WORDS = ("family", "arch", "train_data", "test_data", "run", "status", "reason")
KNOWN = (*WORDS, *NUMBERS)
ERRORS = (
    "error",
    "loss",
)  # metrics that are an error themselves, alone or at the end of a name; of others it is 1 − metric
MAX_TOTAL_MISMATCH = 0.01  # between gmacs_total and the product of the other two: more is a mistake, less is rounding


@dataclass(frozen=True)
class Point:
    """One run on one test. compute: GMACs of a sample's forward × samples seen; error: 1 − metric, or a loss."""

    family: str
    task: str
    metric: str
    compute: float
    error: float
    model: str = ""
    gmacs_per_sample: float | None = None
    samples_seen: float | None = None
    data: str = ""
    data_samples: float | None = None
    """How many different samples there were."""
    run: str = ""
    lr: float | None = None


@dataclass(frozen=True)
class LeftOut:
    """A run, or one of its results, that no fit uses."""

    run: str
    reason: str


@dataclass
class Table:
    """Points, and what was left out of them with its reason."""

    points: list[Point] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def extend(self, other: Table) -> None:
        """Adds another table's rows."""
        self.points += other.points
        self.left_out += other.left_out


def read_csv(path: Path | str) -> Table:
    """The points of a CSV, or of a published study by name. Raises UserError that names file, line and column."""
    if str(path) in PUBLISHED:
        text = (resources.files("dsclip.scaling") / f"{path}.csv").read_text(encoding="utf-8")
        return parse(text.splitlines(), str(path))
    try:
        return parse(Path(path).read_text(encoding="utf-8-sig").splitlines(), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error})") from error


def parse(lines: Iterable[str], source: str) -> Table:
    """As `read_csv`, of lines."""
    reader = csv.DictReader(lines, strict=True)
    columns = list(reader.fieldnames or ())
    metrics = _metrics(columns, source)
    table = Table()
    try:
        for row in reader:
            _read_row(row, metrics, table, f"{source}, line {reader.line_num}")
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num}: {error}") from error
    if not table.points and not table.left_out:
        raise UserError(f"{source} holds no points: a row is a run on a test set, below a line of column names")
    return table


def _metrics(columns: Sequence[str], source: str) -> list[str]:
    if twice := {c for c in columns if columns.count(c) > 1}:
        raise UserError(f"{source}: column `{sorted(twice)[0]}` stands there twice")
    if "gmacs_total" not in columns and not {"gmacs_per_sample", "samples_seen"} <= set(columns):
        raise UserError(
            f"{source}: no column says what a run computed; give `gmacs_total`, or `gmacs_per_sample` and `samples_seen`"
        )
    metrics = [c for c in columns if c not in KNOWN]
    if not metrics:
        raise UserError(f"{source}: no column is a metric; give one such as `acc1`, or `error`")
    return metrics


def _read_row(row: dict[str, str | None], metrics: list[str], table: Table, where: str) -> None:
    if None in row or None in row.values():
        raise UserError(f"{where}: it has more or fewer cells than there are columns")
    words = {name: (row.get(name) or "").strip() for name in WORDS}
    numbers = {name: _number(row.get(name), name, where) for name in NUMBERS}
    run = words["run"] or " ".join(w for w in (words["family"], words["arch"], words["train_data"]) if w) or where
    if words["status"] not in ("", "done"):
        reason = words["reason"] or words["status"]
        if LeftOut(run, reason) not in table.left_out:
            table.left_out.append(LeftOut(run, reason))
        return
    compute = _compute(numbers, where)
    for metric in metrics:
        value = _number(row.get(metric), metric, where)
        if value is None:
            continue
        error = value if metric.endswith(ERRORS) else 1 - value
        if not metric.endswith(ERRORS) and not 0 <= value <= 1:
            raise UserError(
                f"{where}: `{metric}` is {value:g}; give shares between 0 and 1, or a column `{metric}_error`"
            )
        if error <= 0:
            table.left_out.append(LeftOut(run, f"{metric} on {words['test_data']}: an error of 0 has no logarithm"))
            continue
        data_samples = numbers["train_samples"] or named_size(words["train_data"])
        table.points.append(Point(
            words["family"] or "runs", words["test_data"] or metric, metric, compute, error, words["arch"],
            numbers["gmacs_per_sample"], numbers["samples_seen"], words["train_data"], data_samples, run, numbers["lr"],
        ))  # fmt: skip


def _number(text: str | None, column: str, where: str) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: `{column}` is {text!r}; it must be a finite number")
    return value


def _compute(numbers: dict[str, float | None], where: str) -> float:
    per_sample, seen, total = (numbers[name] for name in ("gmacs_per_sample", "samples_seen", "gmacs_total"))
    product = per_sample * seen if per_sample is not None and seen is not None else None
    compute = product if total is None else total
    if compute is None or compute <= 0:
        raise UserError(
            f"{where}: a run's compute must be above 0; give gmacs_total, or gmacs_per_sample and samples_seen"
        )
    if total is not None and product is not None and abs(product / total - 1) > MAX_TOTAL_MISMATCH:
        raise UserError(
            f"{where}: `gmacs_total` is {total:g}, but gmacs_per_sample × samples_seen {product:g}; correct one of them"
        )
    return compute


def named_size(name: str) -> float | None:
    """The samples of a data set whose name ends with them, such as LAION-400M; None of others."""
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([KMB])$", name.upper().replace("-", " "))
    return None if found is None else float(found[1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[found[2]]


def groups(points: Iterable[Point]) -> dict[tuple[str, str, str], list[Point]]:
    """{(task, metric, family): its points}, in the order in which they come."""
    found: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        found.setdefault((point.task, point.metric, point.family), []).append(point)
    return found
