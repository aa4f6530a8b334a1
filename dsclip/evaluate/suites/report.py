"""A suite's one table, as text or Markdown, and its averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsclip.data.shards.overlap import data_name


def averages(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{"name", "value", "of", "entries"}]: means of the main metrics of all entries and of each group, of those that have one.

    of: how many have; entries: how many there are. value: None where none has.
    """
    rows = result["entries"]
    groups = dict.fromkeys(group for row in rows for group in row["groups"])
    parts = {result["average"]: rows} | {group: [row for row in rows if group in row["groups"]] for group in groups}
    found = []
    for name, part in parts.items():
        values = [row["value"] for row in part if row.get("value") is not None]
        mean = sum(values) / len(values) if values else None
        found.append({"name": name, "value": mean, "of": len(values), "entries": len(part)})
    return found


def suite_text(result: Mapping[str, Any]) -> str:
    """The table for people, and what isn't in it."""
    head, rows = _table(result)
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    return "\n".join([f"{result['title']}: {result['model']}", *lines, *_left_out(result)])


def suite_markdown(result: Mapping[str, Any]) -> str:
    """The same as a Markdown table."""
    head, rows = _table(result)
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, ["---"] * len(head), *rows)
    ]
    return "\n".join(
        [f"**{result['title']}**: {result['model']}", "", *lines, "", *(f"* {line}" for line in _left_out(result))]
    )


def _table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["set", "task", "metric", "value", "95% interval", "samples"]
    rows = [_row(row) for row in result["entries"] if "metrics" in row]
    for mean in result["averages"]:
        if mean["value"] is not None:
            rows.append([f"{mean['name']} ({mean['of']} of {mean['entries']})", "", "", f"{mean['value']:.2%}", "", ""])
    return head, rows


def _row(row: Mapping[str, Any]) -> list[str]:
    between = row.get("ci95")
    metrics = row["metrics"]
    count = next((metrics[name] for name in ("samples", "images") if name in metrics), "")
    value = "not reported" if row["value"] is None else f"{row['value']:.2%}"
    interval = f"{between[0]:.2%} – {between[1]:.2%}" if between else ""
    task = row["task"] + ", fine-tuned" * ("fine_tuned" in row)
    return [data_name(row["name"], row["training_pairs"]), task, row["main"], value, interval, str(count)]


def _left_out(result: Mapping[str, Any]) -> Sequence[str]:
    lines = []
    for state, said in (("missing", "not there"), ("unsupported", "not measured"), ("failed", "failed")):
        for row in result["entries"]:
            if row["state"] == state:
                lines.append(f"{said}: {row['name']} ({row['reason']})")
    for row in result["entries"]:
        for reason, count in row.get("bad_samples", {}).items():
            lines.append(f"left out of {row['name']}: {count} {reason}")
    return lines
