"""The rate that a card was measured at: from the committed tables of `tools/bench_gpu.py`, when there is one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dsclip.plan.machine import Machine, datasheet_tflops

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


@dataclass(frozen=True)
class Measured:
    """efficiency: share of the data sheet's peak that a step reached, recomputation counted as work. source: the file."""

    efficiency: float
    source: str


def measured(machine: Machine, preset: str, folder: Path = FOLDER) -> Measured | None:
    """The newest of this card and preset; None where nobody measured it. Tiny runs and other cards don't count."""
    card = _words(machine.name)
    for path in sorted(folder.glob("*.json"), reverse=True):
        found = json.loads(path.read_text(encoding="utf-8"))
        step = found.get("facts", {}).get(f"step {preset.replace('/', '-')}")
        if found.get("device") != "cuda" or found.get("tiny") or step is None or not card <= _words(found["card"]):
            continue
        peak = datasheet_tflops(found["card"]) or machine.tflops
        work = 1e9 * (step["gflops_per_sample"] + step["recomputed_gflops_per_sample"])
        return Measured(work * step["samples_per_second"] / (peak * 1e12), path.name)
    return None


def _words(name: str) -> set[str]:
    return set(name.upper().replace("-", " ").split())
