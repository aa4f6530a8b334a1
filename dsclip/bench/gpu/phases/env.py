"""What is measured on, and its ceilings: a matrix product and a copy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Iterator

import torch

from dsclip.bench.gpu.row import Facts, Row, Settings
from dsclip.bench.measure import environment, median_seconds, product_tflops

PACKAGES = ("triton", "deepspeed", "transformers", "open_clip_torch", "memeff", "siglip-kernel")


def measure(settings: Settings) -> Iterator[Row | Facts]:
    """Facts `environment` and `product_tflops`; rows of a bf16 product of 8192³ and of a copy within the device."""
    yield {"environment": _versions(settings.device) | environment()}
    n, numbers = (256, 1 << 20) if settings.tiny else (8192, 1 << 28)
    product = product_tflops(settings.device, n, 2 if settings.tiny else 20)
    yield {"product_tflops": product}
    yield Row(f"bf16 product, {n}³", product, "TFLOP/s", accept=750)
    source = torch.zeros(numbers, device=settings.device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), settings.repeats, warm_up=2)
    yield Row("copy within the device, read and written", 8e-12 * numbers / seconds, "TB/s", accept=2.8)


def _versions(device: str) -> Facts:
    found: Facts = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = (
            subprocess.run(query, capture_output=True, text=True).stdout if shutil.which("nvidia-smi") else "unknown"
        )
        found["driver"] = asked.split("\n")[0]
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found
