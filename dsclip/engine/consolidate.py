"""Puts the ZeRO shards of a checkpoint together again, in float32, in one process."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEEPSPEED_TAG = "deepspeed"  # folder of DeepSpeed's own files within a checkpoint


def full_precision_weights(folder: Path) -> dict[str, Tensor]:
    """The float32 master weights of a checkpoint by dsclip's names. The folder must have been verified."""
    # Before the first file is opened, which imports DeepSpeed; here, because evaluating a HuggingFace folder needs none.
    import dsclip.engine.quiet_deepspeed  # noqa: F401

    files = folder / DEEPSPEED_TAG
    # ZeRO-1 with float32 accumulation runs DeepSpeed's BF16_Optimizer, whose files zero_to_fp32 doesn't know.
    if bf16_shards := list(files.glob("bf16_zero_*optim_states.pt")):
        if "zero_stage" not in _load(bf16_shards[0])["optimizer_state_dict"]:
            return _from_bf16_optimizer(files, bf16_shards)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It prints every step it takes, and two progress bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=DEEPSPEED_TAG)
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def _from_bf16_optimizer(files: Path, shards: list[Path]) -> dict[str, Tensor]:
    """Each parameter group is one flat vector, cut into equal parts over the ranks, in the order of `param_shapes`."""
    shards.sort(key=lambda path: int(path.name.partition("pp_rank_")[2].partition("_")[0]))
    states = [_load(path)["optimizer_state_dict"]["single_partition_of_fp32_groups"] for path in shards]
    groups = _load(files / "mp_rank_00_model_states.pt")["param_shapes"]
    weights = {}
    for index, shapes in enumerate(groups):
        flat, start = torch.cat([parts[index] for parts in states]), 0
        for name, shape in shapes.items():
            weights[name] = flat[start : start + shape.numel()].view(shape).clone()
            start += shape.numel()
    return weights


def _load(path: Path) -> dict[str, Any]:
    # The checkpoint was verified: every class it refers to is on the allow-list.
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return content
