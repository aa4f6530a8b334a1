"""Results as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsclip.data.shards.overlap import data_name
from dsclip.evaluate.results.intervals import table


def text(result: dict[str, Any]) -> str:
    """One result of `launchers/evaluate.py` as lines, a metric a line with its 95% interval."""
    lines = [f"{result['task']} of {result['model']} on {data_name(result['data'], result['training_pairs'])}"]
    lines += [f"  {name:28} {value:9} {between}".rstrip() for name, value, between in table(result["metrics"])]
    return "\n".join(lines + [f"  left out: {count} {reason}" for reason, count in result["bad_samples"].items()])


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Results as one Markdown table, a metric a row."""
    lines = ["| task | data | metric | value | 95% interval |", "|---|---|---|---|---|"]
    for result in results:
        data = data_name(result["data"], result["training_pairs"])
        counts = {**result["metrics"], **{f"left out: {reason}": n for reason, n in result["bad_samples"].items()}}
        lines += [f"| {result['task']} | {_cell(data)} | {_cell(n)} | {v} | {b} |" for n, v, b in table(counts)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
