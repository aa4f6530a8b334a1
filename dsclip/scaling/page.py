"""One HTML page of a study: its figures and its tables, without anything that must be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from dsclip.scaling.drawing import Drawing

STYLE = """
  body { font: 15px/1.5 sans-serif; color: #1f2933; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
  table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e7eb; text-align: right }
  th:first-child, td:first-child { text-align: left } svg { max-width: 100%; height: auto }
"""


def page(result: dict[str, Any], figures: Sequence[Drawing]) -> str:
    """The page of `tools/scaling_laws.py`'s result."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Scaling laws</title>',
        f"<style>{STYLE}</style></head><body><h1>Scaling laws</h1>",
        f"<p>{escape(', '.join(result['sources']))}: {result['points']} points. Error E against compute C, the GMACs of a sample's "
        "forward times the samples seen. Intervals are of 95%; those of a law's numbers hold all of them at once.</p>",
        table(fit_rows(result["fits"])),
        *(drawing.svg() for drawing in figures),
    ]
    rows = alternative_rows(result["fits"])
    if len(rows) > 1:
        parts += ["<h2>Other laws through the runs that no other beats</h2>", table(rows)]
    if result["left_out"]:
        parts += ["<h2>Left out</h2>", table([["run", "why"], *([r["run"], r["reason"]] for r in result["left_out"])])]
    return "\n".join([*parts, "</body></html>", ""])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of which are headings, as HTML."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table><tr>{head}</tr>{body}</table>"


def fit_rows(fits: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Headings and a row a fit."""
    rows = [["task", "family", "runs", "method", "α", "β", "largest run held out: said, measured"]]
    for fit in fits:
        held = fit["largest_held_out"]
        said = "-" if held is None else f"{held['error']:.3f} {between(held['error_ci95'])}, {held['measured']:.3f}"
        rows.append([
            f"{fit['task']}, {fit['metric']}", fit["family"], str(fit["runs"]), _method(fit),
            f"{fit['alpha']:.3f} {between(fit['alpha_ci95'])}", f"{fit['beta']:.2f} {between(fit['beta_ci95'], 2)}", said,
        ])  # fmt: skip
    return rows


def alternative_rows(fits: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Headings and a row a law; AICc is compared within a family and task, lower is better."""
    rows = [["task", "family", "law", "points", "α", "irreducible error", "rms of log10 E", "AICc"]]
    for fit in fits:
        for form, law in fit["alternatives"].items():
            irreducible = "-" if form == "power" else f"{law['irreducible']:.3f} {between(law['irreducible_ci95'])}"
            rows.append([
                f"{fit['task']}, {fit['metric']}", fit["family"], form, str(law["points"]),
                f"{law['alpha']:.3f} {between(law['alpha_ci95'])}", irreducible, f"{law['rms_log10']:.4f}",
                "-" if law["aicc"] is None else f"{law['aicc']:.1f}",
            ])  # fmt: skip
    return rows


def between(ends: Sequence[float] | None, digits: int = 3) -> str:
    """An interval as people read it; empty where there is none."""
    return "" if ends is None else f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _method(fit: dict[str, Any]) -> str:
    return str(fit["method"]) if fit["form"] == "power" else f"{fit['method']}, {fit['form']}"
