"""The command line of `tools/compare.py`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsclip.command_line import parser, run_tool
from dsclip.errors import UserError
from dsclip.evaluate.results.compare import Row, compare, differing
from dsclip.evaluate.results.record import Record, read_result

EXAMPLE = "python tools/compare.py before.json after.json"
Compared = tuple[dict[str, Any], str]  # as JSON, and as Markdown


def main(argv: list[str] | None = None) -> int:
    """Compares, prints a Markdown table or JSON, returns the exit code."""
    p = parser(
        "Puts results of launchers/evaluate.py --output, or results.json of suites, side by side, with paired bootstrap intervals.",
        EXAMPLE,
    )
    p.add_argument("results", nargs="+", type=Path, help="JSON files; each is compared with the first")
    p.add_argument(
        "--despite", nargs="+", default=[], metavar="FIELD",
        help="fields of the protocol that may differ, such as task.templates_sha256 (default: none but those of the models)",
    )  # fmt: skip
    return run_tool(_compared, p.parse_args(argv))


def _compared(arguments: argparse.Namespace) -> Compared:
    if len(arguments.results) < 2:
        raise UserError("give two results or more")
    suites = [_entries(path) for path in arguments.results]
    if not any(suites):
        records = [read_result(path) for path in arguments.results]
        if unknown := sorted(set(arguments.despite) - set(differing(records)[0])):
            raise UserError(f"--despite {' '.join(unknown)}: these results don't differ in that")
        result, text = _side_by_side(records, arguments.despite)
        return {"results": [str(path) for path in arguments.results], **result}, text
    if not all(suites):
        raise UserError("some of these are results of suites and some of single tasks; give one kind")
    return _of_suites(arguments.results, suites, arguments.despite)


def _entries(path: Path) -> dict[str, Path]:
    """{entry: its result} of a suite's results.json; {} of any other file, which `read_result` looks at."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in content["entries"] if "file" in row]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    # A folder that was moved or copied has its entries beside the table still.
    beside = {row["name"]: path.parent / "entries" / Path(row["file"]).name for row in rows}
    return {row["name"]: beside[row["name"]] if beside[row["name"]].is_file() else Path(row["file"]) for row in rows}


def _of_suites(paths: Sequence[Path], suites: Sequence[Mapping[str, Path]], despite: Sequence[str]) -> Compared:
    """An entry after the other. One that some suites lack, or that was not measured alike, is named with the reason."""
    compared: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    parts = []
    for name in dict.fromkeys(name for suite in suites for name in suite):
        if lacking := [str(path) for path, suite in zip(paths, suites, strict=True) if name not in suite]:
            left_out[name] = f"no result in {', '.join(lacking)}"
            continue
        try:
            compared[name], text = _side_by_side([read_result(suite[name]) for suite in suites], despite)
        except UserError as error:
            left_out[name] = str(error)
        else:
            parts.append(f"**{name}**\n\n{text}")
    if not compared:
        raise UserError("nothing to compare: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()))
    parts += [f"not compared: {name}: {why}" for name, why in left_out.items()]
    return {"results": [str(path) for path in paths], "entries": compared, "not_compared": left_out}, "\n\n".join(parts)


def _side_by_side(records: Sequence[Record], despite: Sequence[str]) -> Compared:
    other, of_models = differing(records)
    if refused := [name for name in other if name not in despite]:
        what = "; ".join(f"{name}: {' against '.join(map(str, other[name]))}" for name in refused)
        raise UserError(
            f"these results were not measured alike: {what}. --despite {' '.join(refused)} compares them still"
        )
    rows, differences = compare(records), {**other, **of_models}
    result = {"protocol_differences": differences, "metrics": {row.metric: _row(row) for row in rows}}
    return result, _markdown(records, rows, differences)


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
