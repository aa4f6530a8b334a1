"""What one rank runs on: its memory and its rates."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import psutil
import torch

from dsclip.errors import UserError, did_you_mean
from dsclip.plan.free_memory import free_bytes

USABLE = 0.9  # of the memory: the rest is for the CUDA context, fragments and the loader
# Memory in 10⁹ bytes and dense bf16 in 10¹² operations a second, from the vendors' data sheets.
GPUS = {
    "B200": (180, 2250), "H200": (141, 989), "GH200": (96, 989), "H100": (80, 989), "A100": (80, 312), "L40S": (48, 362),
    "L40": (48, 181), "A40": (48, 150), "A30": (24, 165), "L4": (24, 121), "A10": (24, 125), "A6000": (48, 155),
    "4090": (24, 165), "3090": (24, 71),
}  # fmt: skip
CPU_TFLOPS_A_THREAD = 0.35  # measured with AMX; cores without it reach a tenth, but the order of plans is the same
# A CPU process after its first step, beside tensors (threads, packed weights, compiled ops, more of the libraries'
# pages): measured with torch's CPU and CUDA builds, in GB and as a share of what the imports took.
LIBRARIES_GB, LIBRARIES_SHARE = 0.07, 0.25
CUDA_WORKSPACE_GB = 0.2


@dataclass(frozen=True)
class Machine:
    """One rank's device. memory_gb: in 10⁹ bytes; base_gb: what a process takes without a model."""

    device: str  # cpu | cuda
    memory_gb: float
    base_gb: float
    tflops: float  # peak in bf16
    efficiency: float  # the share of the peak that training reaches
    gigabytes_per_second: float  # of a rank's collectives
    name: str = "GPU"


def this_machine(ranks: int | None = None) -> Machine:
    """The machine of this process. A CPU's ranks (default: those the launcher started here) share the memory that is free."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
        return gpu(device.total_memory / 1e9, datasheet_tflops(device.name), device.name)
    ranks = ranks or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return cpu(free_bytes() / 1e9 / ranks + _resident_gb())


def named_gpu(name: str, memory_gb: float | None = None, tflops: float | None = None) -> Machine:
    """A GPU by its name, such as H100 or A100-40GB, with the memory and the peak of its data sheet where none are given."""
    known = _data_sheet(name)
    sizes = [float(size) for size in re.findall(r"(\d+)\s?GB", name, re.IGNORECASE)]
    if memory_gb is None:  # the smaller of the two: `GH200 480GB` counts the host's memory
        memory_gb = min([*sizes, *([known[0]] if known else [])], default=None)
    tflops = tflops or (known and known[1])
    if not memory_gb or not tflops:
        raise UserError(
            f"--gpu {name} is not known here.{did_you_mean(name.upper(), list(GPUS))} Known: {', '.join(GPUS)}. "
            "For another one give --memory-gb and --peak-tflops."
        )
    return gpu(memory_gb, tflops, name)


def gpu(memory_gb: float, tflops: float | None, name: str = "GPU") -> Machine:
    """A GPU, with the rates of a well-connected cluster (400 Gbit/s a GPU) and an efficiency that CLIP training reaches."""
    return Machine("cuda", memory_gb, CUDA_WORKSPACE_GB, tflops or GPUS["A100"][1], 0.4, 50, name)


def cpu(memory_gb: float) -> Machine:
    """The CPU cores of this process, whose libraries are a good part of a small run's memory: import them first."""
    base = LIBRARIES_GB + (1 + LIBRARIES_SHARE) * _resident_gb()
    return Machine("cpu", memory_gb, base, CPU_TFLOPS_A_THREAD * torch.get_num_threads(), 1, 2, "CPU")


def datasheet_tflops(name: str) -> float | None:
    """The bf16 peak of a GPU by its name, None if unknown."""
    known = _data_sheet(name)
    return known and known[1]


def _data_sheet(name: str) -> tuple[float, float] | None:
    words = re.split(r"[^A-Z0-9]+", name.upper().replace("RTX", " "))
    return next((GPUS[word] for word in words if word in GPUS), None)


def _resident_gb() -> float:
    return float(psutil.Process().memory_info().rss / 1e9)
