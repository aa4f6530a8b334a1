"""DeepSpeed, imported with two corrections: what it prints, and how its checkpoints name an enum."""

from __future__ import annotations

import logging
import os
import warnings

import torch

if not torch.cuda.is_available():
    # Otherwise it prints on standard output, where tools write their JSON, that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402  (after the choice of accelerator)
from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: E402

# Its INFO lines and torch's repeated deprecation warnings bury what a user wants to read.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.*|deepspeed.*")
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor|_base).*")

# Python 3.11.0 to 3.11.3 pickle an enum through getattr, which no checkpoint that is loaded may refer to.
ZeroStageEnum.__reduce_ex__ = lambda self, protocol: (ZeroStageEnum, (self.value,))

__all__ = ["deepspeed"]
