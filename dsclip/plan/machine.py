"""What one rank runs on: its memory and its rates."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

USABLE = 0.9  # of the memory: the rest is for the CUDA context, fragments and the loader
# Dense bf16 in 10¹² operations a second, from the vendors' data sheets; the first name that occurs in the device's.
DATASHEET_TFLOPS = {"H200": 989, "H100": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121, "A10": 125}
CPU_TFLOPS_A_THREAD = 0.35  # measured with AMX; cores without it reach a tenth, but the order of plans is the same
# A CPU process after its first step, beside tensors (threads, packed weights, compiled ops, more of the libraries'
# pages): measured with torch's CPU and CUDA builds, in GB and as a share of what the imports took.
LIBRARIES_GB, LIBRARIES_SHARE = 0.13, 0.25
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


def this_machine() -> Machine:
    """The machine of this process, whose memory the ranks on it share."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
        return gpu(device.total_memory / 1e9, datasheet_tflops(device.name))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return cpu(_memory_bytes() / 1e9 / ranks)


def gpu(memory_gb: float, tflops: float | None) -> Machine:
    """A GPU, with the rates of a well-connected cluster (400 Gbit/s a GPU) and an efficiency that CLIP training reaches."""
    return Machine("cuda", memory_gb, CUDA_WORKSPACE_GB, tflops or DATASHEET_TFLOPS["A100"], 0.4, 50)


def cpu(memory_gb: float) -> Machine:
    """The CPU cores of this process."""
    importlib.import_module("dsclip.engine")  # its libraries are a good part of a small run's memory
    base = LIBRARIES_GB + (1 + LIBRARIES_SHARE) * _resident_gb()
    return Machine("cpu", memory_gb, base, CPU_TFLOPS_A_THREAD * torch.get_num_threads(), 1, 2)


def datasheet_tflops(name: str) -> float | None:
    """The bf16 peak of a GPU by its name, None if unknown."""
    return next((value for known, value in DATASHEET_TFLOPS.items() if known in name), None)


def _resident_gb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e9


def _memory_bytes() -> int:
    """The machine's memory, or what its container may use."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total
