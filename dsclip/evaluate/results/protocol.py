"""The protocol record of a result: what one must know to measure the same again, and what a comparison looks for."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from dsclip.data import EvalDataset, Tokenizer
from dsclip.data.shards.manifest import manifest_sha256
from dsclip.engine.consolidate import ShardedWeights
from dsclip.evaluate.tasks.task import Task, lines_sha256
from dsclip.files import sha256
from dsclip.model import ClipConfig

PACKAGES = ("dsclip", "torch", "transformers", "numpy", "pillow")


def task_protocol(task: Task) -> dict[str, Any]:
    """What the task says of itself and of its sets: {"task", "data"}; data: the texts and labels of each set as a hash."""
    # Corrupted pictures of a set have its texts; what was done to them is in the task's own record.
    sets = [
        {"samples": len(part.indices), "texts_sha256": texts_sha256(part.dataset, part.indices)}
        for part in task.images
        if part.dataset.corruption is None
    ]
    return {"task": dict(task.protocol), "data": sets[-1] if len(sets) == 1 else {"sets": sets}}


def whole_protocol(run: Mapping[str, Any], task: Task, dataset: EvalDataset, name: str) -> dict[str, Any]:
    """The record of one result: of the run, see `run_protocol`, of the task, and of the data by its name, split and manifest."""
    record = {**run, **task_protocol(task)}
    manifest = manifest_sha256(dataset.shards, dataset.storage) if dataset.shards else None
    record["data"] |= {"name": name, "split": dataset.split, "manifest_sha256": manifest}
    return record


def run_protocol(
    model: nn.Module, path: str, config: ClipConfig, tokenizer: Tokenizer, tokenizer_name: str, dtype: torch.dtype,
    device: torch.device, stored: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What is the same for all tasks of one model: {"model", "image", "text", "precision", "versions"}.

    stored: its weights as they are on the disk, for a model of which some are not in memory.
    """
    return {
        "model": {"path": path, "weights_sha256": weights_sha256(model, stored, dtype)},
        "image": image_protocol(config),
        "text": {
            "context_length": config.context_length, "tokenizer": tokenizer_name, "tokenizer_sha256": tokenizer.sha256()
        },
        "precision": precision(dtype, device),
        "versions": versions(),
    }  # fmt: skip


def texts_sha256(dataset: EvalDataset, indices: list[int]) -> str:
    """Of captions, hard negatives and labels of these samples, in their order: the same in any format that holds them."""
    rows = ((dataset.captions[i], dataset.negatives[i], dataset.labels[i]) for i in indices)
    return lines_sha256([repr(row) for row in rows])


def image_protocol(config: ClipConfig) -> dict[str, Any]:
    """How a picture becomes the model's input, see `dsclip.data.decoding.transforms.eval_image`."""
    return {
        "size": config.image_size, "resize": "shorter side to size, the longer rounded down", "interpolation": "bicubic, antialiased",
        "crop": "centre, corner rounded down", "transparent": "on white", "mean": list(config.image_mean), "std": list(config.image_std),
    }  # fmt: skip


def precision(dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """The dtype of the towers and what they ran on; features, similarities and metrics are float32 and float64."""
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"dtype": str(dtype).removeprefix("torch."), "device": on}


def versions() -> dict[str, str]:
    """{package: its version} of what decides about numbers, and Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout without an installation
            found[name] = "not installed"
    return found


def weights_sha256(
    model: nn.Module, stored: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """Of all weights by name, as they are evaluated (another dtype is another hash).

    stored, dtype: the same weights on the disk and what they become, for a model of which some are not in memory; None when
    they are needed and not given.
    """
    state: Mapping[str, Tensor] = model.state_dict()
    if any(value.is_meta for value in state.values()):
        if stored is None:
            return None
        pieces: dict[str, Callable[[], Tensor]] = {name: partial(stored.__getitem__, name) for name in stored}
        whole = {name: value.dtype for name, value in state.items() if not value.is_floating_point()}
        state = ShardedWeights(pieces | {name: partial(_as, stored, name, kind) for name, kind in whole.items()})
    return state_sha256(state, dtype)


def state_sha256(state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Of weights by name, in the order of the names, as they are or in another dtype."""
    return sha256(piece for name in sorted(state) for piece in (name.encode(), _bytes(_in(state[name], dtype))))


def _in(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _as(stored: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    return stored[name].to(dtype)


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
