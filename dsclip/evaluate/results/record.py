"""A result on disk: `NAME.json` for all, and beside it `NAME.values.safetensors` with the values of single samples, for comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dsclip.data import EvalDataset
from dsclip.data.shards.overlap import trained_on
from dsclip.data.sources.storage import Storage
from dsclip.errors import UserError
from dsclip.evaluate.results.intervals import with_intervals
from dsclip.evaluate.results.result import Measured, Outcomes, Reduction
from dsclip.files import write_whole

VALUES = ".values.safetensors"


class Record(NamedTuple):
    """A result as it was written: the JSON, and the values of its metrics."""

    path: Path
    result: dict[str, Any]
    outcomes: Mapping[str, Outcomes]


def result_of(
    task: str, measured: Measured, dataset: EvalDataset, *, model: str, data: str, train_shards: str | list[str] | None,
    storage: Storage,
) -> dict[str, Any]:  # fmt: skip
    """{"task", "metrics", …}: what was measured, without the protocol. train_shards: what the model was trained on, where that is known."""
    return {
        "task": task, "metrics": with_intervals(measured), "model": model, "data": data,
        "training_pairs": trained_on(dataset.shards, train_shards, storage), "bad_samples": dict(dataset.bad),
    }  # fmt: skip


def write_result(path: Path, result: Mapping[str, Any], measured: Measured) -> None:
    """Writes both files, the values first."""
    tensors = {}
    for name, found in measured.outcomes.items():
        tensors[f"{name}.values"] = found.values.contiguous()
        tensors[f"{name}.units"] = found.units.contiguous()
        if found.groups is not None:
            tensors[f"{name}.groups"] = found.groups.contiguous()
    reductions = {name: str(found.reduction) for name, found in measured.outcomes.items()}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # metrics share some, which safetensors refuses
    write_whole(values_of(path), save(copies, metadata=reductions))
    write_whole(path, json.dumps(result, indent=2) + "\n")


def values_of(path: Path) -> Path:
    """The file of values beside a result; of a name of its own, because NAME.safetensors may be a model's weights."""
    return path.with_suffix(VALUES)


def read_result(path: Path) -> Record:
    """Raises UserError for what is no result, or has no values beside it."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error})") from error
    if not isinstance(result, dict) or not {"task", "metrics", "protocol"} <= result.keys():
        raise UserError(f"{path} is no result with a protocol; write one with launchers/evaluate.py --output FILE")
    return Record(path, result, _read_values(values_of(path)))


def _read_values(path: Path) -> dict[str, Outcomes]:
    if not path.is_file():
        raise UserError(f"{path} is missing: the values of single samples, which lie beside their result")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            reductions: dict[str, str] = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); evaluate again") from error
    if not set(reductions.values()) <= set(get_args(Reduction)):
        raise UserError(f"{path} is of another version of dsclip; evaluate again")
    return {
        name: Outcomes(
            tensors[f"{name}.values"],
            tensors[f"{name}.units"].to(torch.int64),
            cast(Reduction, reduction),
            tensors.get(f"{name}.groups"),
        )
        for name, reduction in sorted(reductions.items())
    }
