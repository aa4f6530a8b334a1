"""Puts the ZeRO shards of a checkpoint together again, in float32, in one process."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEEPSPEED_TAG = "deepspeed"  # folder of DeepSpeed's own files within a checkpoint
MODEL_STATES = "mp_rank_00_model_states.pt"  # where the module lies whole, in ZeRO-1 and 2


class ShardedWeights(Mapping[str, Tensor]):
    """Weights by dsclip's names, each put together from mapped files when it is asked for."""

    def __init__(self, pieces: dict[str, Callable[[], Tensor]]):
        self._pieces = pieces

    def __getitem__(self, name: str) -> Tensor:
        return self._pieces[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


def full_precision_weights(folder: Path) -> ShardedWeights:
    """The float32 master weights of a checkpoint by dsclip's names. The folder must have been verified.

    Weights of a locked tower have no masters: they are what the run computed with, widened.
    """
    # Before the first file is opened, which imports DeepSpeed; here, because evaluating a HuggingFace folder needs none.
    import dsclip.engine.quiet_deepspeed  # noqa: F401

    files = folder / DEEPSPEED_TAG
    # ZeRO-1 with float32 accumulation runs DeepSpeed's BF16_Optimizer, whose files zero_to_fp32 doesn't know.
    if bf16_shards := list(files.glob("bf16_zero_*optim_states.pt")):
        if "zero_stage" not in load_mapped(bf16_shards[0])["optimizer_state_dict"]:
            return _from_bf16_optimizer(files, bf16_shards)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It prints every step it takes, and two progress bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=DEEPSPEED_TAG, lazy_mode=True)
    # Of ZeRO-3, what is found are descriptions of where a tensor's parts lie; a copy holds no file open.
    found = {name: partial(_copied, w) for name, w in weights.items()}
    path = files / MODEL_STATES  # of ZeRO-3 no file holds the module, and zero_to_fp32 has found its frozen weights
    return ShardedWeights(found | (_frozen(load_mapped(path), found) if path.is_file() else {}))


def _copied(weight: Any) -> Tensor:
    """Put together in float32, which is a copy of its own for parts of several ranks, and no view of a mapped file."""
    whole: Tensor = weight.contiguous().detach().float()
    return whole.clone() if isinstance(weight, Tensor) else whole


def _from_bf16_optimizer(files: Path, shards: list[Path]) -> ShardedWeights:
    """Each parameter group is one flat vector, cut into equal parts over the ranks, in the order of `param_shapes`."""
    shards.sort(key=lambda path: int(path.name.partition("pp_rank_")[2].partition("_")[0]))
    states = [load_mapped(path)["optimizer_state_dict"]["single_partition_of_fp32_groups"] for path in shards]
    model_states = load_mapped(files / MODEL_STATES)
    pieces: dict[str, Callable[[], Tensor]] = {}
    for index, shapes in enumerate(model_states["param_shapes"]):
        parts, start = [state[index] for state in states], 0
        for name, shape in shapes.items():
            pieces[name] = partial(_cut, parts, start, shape)
            start += shape.numel()
    return ShardedWeights(pieces | _frozen(model_states, pieces))


def _frozen(model_states: dict[str, Any], trained: Collection[str]) -> dict[str, Callable[[], Tensor]]:
    """The weights that no optimizer has, beside `trained`: of ZeRO-1 only the whole module holds them."""
    module = model_states["module"]
    return {name: partial(_copied, weight) for name, weight in module.items() if name not in trained}


def _cut(parts: list[Tensor], start: int, shape: torch.Size) -> Tensor:
    """The tensor that begins at element `start` of the vector which `parts` make one after the other."""
    found, stop = [], start + shape.numel()
    for part in parts:
        found.append(part[max(0, start) : max(0, stop)])
        start, stop = start - len(part), stop - len(part)
    return torch.cat(found).view(shape)


def load_mapped(path: Path) -> dict[str, Any]:
    """A file of a checkpoint that was verified, its tensors mapped into memory."""
    # The checkpoint was verified: every class it refers to is on the allow-list.
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    return content
