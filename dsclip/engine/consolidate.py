"""Puts the ZeRO shards of a checkpoint together again, in float32, in one process."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from torch import Tensor

DEEPSPEED_TAG = "deepspeed"  # folder of DeepSpeed's own files within a checkpoint


def full_precision_weights(folder: Path) -> dict[str, Tensor]:
    """The float32 master weights of a checkpoint by dsclip's names. The folder must have been verified."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):  # it prints every step it takes
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=DEEPSPEED_TAG)
    return {name: tensor.detach().clone() for name, tensor in weights.items()}
