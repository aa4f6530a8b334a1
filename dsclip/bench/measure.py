"""Runs one measurement in a fresh process, so that its peak memory is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from dsclip.errors import UserError


def in_process(module: str, settings: dict) -> dict:
    """What `python -m module '<settings as JSON>'` prints as its last line of JSON. Raises UserError with its output."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(_root()), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "-m", module, json.dumps(settings)], capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise UserError(f"{settings} failed with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    return json.loads(lines[-1])


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def reset_peak() -> None:
    """Peak memory is counted from here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Since `reset_peak`: allocated on the GPU, or resident in this process, in 10⁶ bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def settle() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment() -> dict:
    """What was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"
