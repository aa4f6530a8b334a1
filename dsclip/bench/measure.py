"""Runs one measurement in a fresh process, so that its peak memory is its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dsclip.errors import UserError
from dsclip.plan.machine import datasheet_tflops


def in_process(module: str, settings: Mapping[str, Any], ranks: int | None = None) -> dict[str, Any]:
    """What `python -m module '<settings as JSON>'` prints as its last line of JSON. Raises UserError with its output.

    ranks: how many processes torchrun starts of it, each with one thread; None: one without torchrun.
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(_root()), os.environ.get("PYTHONPATH")]))}
    launcher = [] if ranks is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, "-m", module, json.dumps(dict(settings))]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise UserError(f"{settings} failed with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


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


def seconds_of(run: Callable[[], object], repeats: int, warm_up: int = 1) -> list[float]:
    """How long each of the repeats took until the device was done, after some to warm up that don't count."""
    seconds = []
    for _ in range(warm_up + repeats):
        settle()
        start = time.perf_counter()
        run()
        settle()
        seconds.append(time.perf_counter() - start)
    return seconds[warm_up:]


def median_seconds(run: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """The median of `seconds_of`."""
    return statistics.median(seconds_of(run, repeats, warm_up))


def product_tflops(device: str, n: int = 8192, repeats: int = 5) -> float:
    """10¹² operations a second of a bf16 product of two n × n matrices: what this device reaches, not its data sheet."""
    x, y = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: x @ y, repeats, warm_up=3) / 1e12


def utilisation(flops_per_second: float, measured_tflops: float) -> dict[str, float | None]:
    """Model FLOPs utilisation (PaLM, appendix B: no recomputation counted) against the data sheet and a measured product."""
    sheet = datasheet_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    reached = flops_per_second / 1e12
    return {
        "datasheet_tflops": sheet,
        "datasheet": None if sheet is None else reached / sheet,
        "measured_tflops": measured_tflops,
        "measured": reached / measured_tflops,
    }


def environment() -> dict[str, str | int]:
    """What was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"
