"""DeepSpeed, imported without what it would print on standard output, where tools write their JSON."""

from __future__ import annotations

import logging
import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it prints that it found no GPU

import deepspeed  # noqa: E402  (after the choice of accelerator)

# Its INFO lines and torch's repeated deprecation warnings bury what a user wants to read.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.*|deepspeed.*")
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor|_base).*")

__all__ = ["deepspeed"]
