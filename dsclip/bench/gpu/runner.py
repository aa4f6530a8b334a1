"""Runs phases one after the other, each in a process of its own that is ended at its deadline."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from dsclip.bench.gpu.row import Facts, Row, Settings
from dsclip.bench.gpu.schedule import Phase
from dsclip.command_line import say

ROOT = Path(__file__).resolve().parents[3]
LEAST_SECONDS = 10  # a phase that has less left than this would only import torch


@dataclass
class Outcome:
    """What became of a phase. status: done, failed, or what the clock did to it."""

    phase: str
    status: str
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    facts: Facts = field(default_factory=dict)


def run_phases(
    phases: Iterable[Phase], device: str, tiny: bool, minutes: float | None, log: IO[str],
    report: Callable[[list[Outcome]], None],
) -> list[Outcome]:  # fmt: skip
    """What each phase found, in order. report: called after each with all so far. log: gets every phase's whole output."""
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    phases, found, facts = list(phases), list[Outcome](), Facts()
    for number, phase in enumerate(phases, 1):
        left = end - time.monotonic()
        limit = min(phase.deadline_s, left)
        if left < LEAST_SECONDS:
            found.append(Outcome(phase.name, "left out: no time was left"))
        else:
            clock = "" if minutes is None else f", {left / 60:.1f} minutes left"
            say(f"[{number}/{len(phases)}] {phase.name}: at most {limit:.0f} s{clock}")
            found.append(_run(phase, Settings(device, tiny, phase.options, facts), limit, log))
            facts |= found[-1].facts
        say(f"    {found[-1].status}, {found[-1].seconds:.0f} s, {len(found[-1].rows)} rows")
        report(found)
    return found


def _run(phase: Phase, settings: Settings, limit_s: float, log: IO[str]) -> Outcome:
    log.write(f"\n== {phase.name}\n")
    log.flush()
    command = [sys.executable, "-m", "dsclip.bench.gpu.worker", phase.module, json.dumps(asdict(settings))]
    started, outcome, late = time.monotonic(), Outcome(phase.name, "done"), threading.Event()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(settings.device), start_new_session=True
    )  # fmt: skip

    def end() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(limit_s, end)
    timer.start()
    try:
        for line in process.stdout or ():
            log.write(line)
            for kind, value in _parsed(line):
                if kind == "row":
                    outcome.rows.append(Row(**value))
                else:
                    outcome.facts |= value
        code = process.wait()
    finally:
        timer.cancel()
        _kill(process)  # and what it started, also when this process is interrupted
    outcome.seconds = time.monotonic() - started
    if late.is_set():
        outcome.status = f"ended at its deadline of {limit_s:.0f} s"
    elif code:
        outcome.status = f"failed with exit code {code}: see the log"
    return outcome


def _parsed(line: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The row or the facts of a line; nothing for what libraries print."""
    with contextlib.suppress(json.JSONDecodeError):
        value = json.loads(line)
        if isinstance(value, dict) and value.keys() <= {"row", "facts"}:
            yield from value.items()


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment(device: str) -> dict[str, str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if device == "cpu":
        return env | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    env.pop("DS_ACCELERATOR", None)
    # Text shapes vary, and segments that can grow leave no fragments behind.
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | env
