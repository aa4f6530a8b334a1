"""The command line of `tools/compare.py`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsclip.command_line import parser, run_tool
from dsclip.errors import UserError
from dsclip.evaluate.compare import Row, compare, differing
from dsclip.evaluate.record import Record, read_result

EXAMPLE = "python tools/compare.py before.json after.json"


def main(argv: list[str] | None = None) -> int:
    """Compares, prints a Markdown table or JSON, returns the exit code."""
    p = parser("Puts results of launchers/evaluate.py --output side by side, with paired bootstrap intervals.", EXAMPLE)
    p.add_argument("results", nargs="+", type=Path, help="JSON files; each is compared with the first")
    p.add_argument(
        "--despite", nargs="+", default=[], metavar="FIELD",
        help="fields of the protocol that may differ, such as task.templates_sha256 (default: none but those of the models)",
    )  # fmt: skip
    return run_tool(_compared, p.parse_args(argv))


def _compared(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if len(arguments.results) < 2:
        raise UserError("give two results or more")
    records = [read_result(path) for path in arguments.results]
    other, of_models = differing(records)
    if unknown := sorted(set(arguments.despite) - set(other)):
        raise UserError(f"--despite {' '.join(unknown)}: these results don't differ in that")
    if refused := [name for name in other if name not in arguments.despite]:
        what = "; ".join(f"{name}: {' against '.join(map(str, other[name]))}" for name in refused)
        raise UserError(
            f"these results were not measured alike: {what}. --despite {' '.join(refused)} compares them still"
        )
    rows = compare(records)
    result = {
        "results": [str(record.path) for record in records],
        "protocol_differences": {**other, **of_models},
        "metrics": {row.metric: _row(row) for row in rows},
    }
    return result, _markdown(records, rows, {**other, **of_models})


def _row(row: Row) -> dict[str, Any]:
    differences = [{"difference": d.difference, "ci95": list(d.interval), "p": d.p} for d in row.differences]
    return {"values": row.values, "against_the_first": differences}


def _markdown(records: Sequence[Record], rows: Sequence[Row], differences: Mapping[str, list[Any]]) -> str:
    """The results' names, what differs in their protocols, and a table with a row a metric."""
    names = [chr(ord("A") + i) if len(records) <= 26 else str(i + 1) for i in range(len(records))]
    lines = [f"{n}: {r.path} ({r.result['model']})" for n, r in zip(names, records, strict=True)]
    lines += [f"differs: {field}: {' / '.join(map(_short, values))}" for field, values in differences.items()]
    header = ["metric", *names, *(f"{name} − {names[0]} (95%), p" for name in names[1:])]
    lines += ["", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in rows:
        cells = [f"{value:.2%}" for value in row.values]
        for found in row.differences:
            low, high = found.interval
            cells.append(f"{100 * found.difference:+.2f} ({100 * low:+.2f} – {100 * high:+.2f}), {found.p:.3f}")
        lines.append(f"| {row.metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
