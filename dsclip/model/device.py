"""Whether a device can compute a model as its configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dsclip.model.attention import check_attention
from dsclip.model.config import ClipConfig
from dsclip.model.fp8 import check_fp8


def check_device(config: ClipConfig, device: torch.device, ds_config: Mapping[str, Any]) -> None:
    """Raises UserError, in one line, for attention kernels and fp8 products that can't be had there in DeepSpeed's dtype."""
    dtype = torch.bfloat16 if (ds_config.get("bf16") or {}).get("enabled") else torch.float32
    check_attention(config, device, dtype)
    check_fp8(config, device, dtype)
