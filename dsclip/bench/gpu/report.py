"""The table of a run as Markdown, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dsclip.bench.gpu.row import Facts, Row
from dsclip.bench.gpu.runner import Outcome

WORD = {True: "yes", False: "**no**", None: ""}


def as_json(outcomes: Sequence[Outcome], device: str, title: Facts) -> dict[str, Any]:
    """{"date", "card", "device", "command", "facts", "missed", "failed", "phases": [{"phase", "status", "seconds", "rows"}]}."""
    facts: Facts = {}
    for outcome in outcomes:
        facts |= outcome.facts
    phases = [
        {
            "phase": o.phase, "status": o.status, "seconds": round(o.seconds, 1),
            "rows": [asdict(row) | {"met": row.met(device)} for row in o.rows],
        }
        for o in outcomes
    ]  # fmt: skip
    missed = [f"{o.phase}: {row.name}" for o in outcomes for row in o.rows if row.met(device) is False]
    failed = [o.phase for o in outcomes if o.status != "done" and not o.status.startswith("left out")]
    return {**title, "device": device, "facts": facts, "missed": missed, "failed": failed, "phases": phases}


def as_markdown(result: dict[str, Any], log_name: str) -> str:
    """The page: what ran on what, then a table a phase. Numbers stand there only where they were measured."""
    device = result["device"]
    lines = [f"# {result['date']}, {result['card']}", "", f"    {result['command']}", ""]
    if environment := result["facts"].get("environment"):
        lines += [", ".join(f"{k} {v}" for k, v in environment.items()) + ".", ""]
    if device == "cpu":
        lines += ["On a CPU with tiny shapes: only exactness is judged, and times say nothing about a GPU.", ""]
    lines += [f"Medians; batches lie on the device before the clock starts. Raw output: `{log_name}`."]
    for phase in result["phases"]:
        lines += ["", f"## {phase['phase']}", "", f"{phase['status']}, {phase['seconds']:.0f} s.".capitalize(), ""]
        if phase["rows"]:
            lines += ["| | measured | accept | stretch | met |", "|---|---|---|---|---|"]
        for values in phase["rows"]:
            row = Row(**{k: v for k, v in values.items() if k != "met"})
            sign = "≤ " if row.at_most else "≥ "
            accept, stretch = ("" if x is None else sign + _number(x) for x in (row.accept, row.stretch))
            measured = "" if row.value is None else f"{_number(row.value)} {row.unit}".strip()
            note = f"{measured}; {row.note}".strip("; ") if row.note else measured
            lines.append(f"| {row.name} | {note} | {accept} | {stretch} | {WORD[values['met']]} |")
    return "\n".join([*lines, ""])


def _number(x: float) -> str:
    if x and abs(x) < 1e-3:
        return f"{x:.1e}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"
