"""What `tools/scaling_laws.py` says: its result as JSON, and the same in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsclip.scaling.bottleneck import Series, short
from dsclip.scaling.frontier import Method
from dsclip.scaling.law import bounded_exp
from dsclip.scaling.page import alternative_rows, between, fit_rows
from dsclip.scaling.study import AHEAD, FamilyFit, Fit, extrapolate, hold_out_largest


def as_json(fit: FamilyFit, at: Sequence[float], method: Method | None, form: Any) -> dict[str, Any]:
    """One entry of `fits`. at: computes to predict, beside multiples of the largest; method, form: as they were asked for."""
    logs = fit.draws[:, 0] - fit.draws[:, 1] * fit.law.fitted.origin  # ln β, which may be far beyond any number as β
    ends = [[float(v) for v in np.percentile(values, [2.5, 97.5])] for values in (fit.draws[:, 1], logs)]
    largest = fit.range[1]
    return {
        "task": fit.task, "metric": fit.metric, "family": fit.family, "method": fit.method, "runs": len(fit.runs),
        **_numbers(fit.law), "compute_range": list(fit.range),
        "drawn": {"from": fit.draws_from, "alpha_ci95": ends[0], "beta_ci95": [float(v) for v in bounded_exp(np.array(ends[1]))]},
        "pareto": [{"run": p.run, "model": p.model, "compute": p.compute, "error": p.error} for p in fit.front],
        "alternatives": {form: _numbers(law) for form, law in fit.alternatives.items()},
        "predictions": extrapolate(fit, [*at, *(largest * times for times in AHEAD)]),
        "largest_held_out": hold_out_largest(fit.runs, method, form),
    }  # fmt: skip


def _numbers(fit: Fit) -> dict[str, Any]:
    law = fit.law
    return {
        "form": law.form, "points": fit.points, "alpha": law.alpha, "alpha_ci95": _list(fit.alpha_ci95),
        "beta": law.beta, "beta_ci95": _list(fit.beta_ci95), "irreducible": law.irreducible,
        "irreducible_ci95": _list(fit.irreducible_ci95), "offset_gmacs": law.offset, "rms_log10": fit.rms, "aicc": fit.aicc,
    }  # fmt: skip


def _list(ends: tuple[float, float] | None) -> list[float] | None:
    return None if ends is None else list(ends)


def text(result: dict[str, Any], series: dict[str, list[Series]]) -> str:
    """The result for people."""
    lines = [f"{result['points']} points of {', '.join(result['sources'])}; E = β·C^α, C in GMACs", ""]
    lines += columns(fit_rows(result["fits"]))
    alternatives = alternative_rows(result["fits"])
    if len(alternatives) > 1:
        lines += ["", "other laws, through the runs that no other beats:", *columns(alternatives)]
    for name, rows in series.items():
        held_back = [b for b in result["bottlenecks"] if b["of"] == name and b["bottleneck"]]
        lines += ["", f"{name}: {len(held_back)} of {len(rows)} series are held back by what does not grow"]
        lines += [f"  {_series(b)}" for b in held_back]
    for left in result["left_out"]:
        lines.append(f"left out: {left['run']}: {left['reason']}")
    return "\n".join(lines)


def _series(b: dict[str, Any]) -> str:
    names = {"model": "larger models", "data": "more data", "samples_seen": "more samples seen"}
    held = ", ".join(b["held"].values())
    errors = ", ".join(f"{name} {error:.3f}" for name, error in zip(b["names"], b["errors"], strict=True))
    return f"{names[b['varied']]} at {held}: {errors}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells in columns as wide as their widest cell."""
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def comparison_text(found: dict[str, Any]) -> str:
    """Two families at equal compute, for people."""
    a, b, c = found["a"], found["b"], found["crossing"]
    lines = [f"{found['task']}, {found['metric']}: {a} and {b} at equal compute"]
    rows = [["GMACs", a, b, f"{b} / {a}", "ahead", "confidence", ""]]
    for at in found["at"]:
        rows.append([
            f"{at['compute']:.2e}", f"{at['error'][a]:.3f}", f"{at['error'][b]:.3f}", f"{at['ratio']:.3f} {between(at['ratio_ci95'])}",
            at["leads"], f"{at['confidence']:.0%}", "extrapolated" if at["extrapolated"] else "",
        ])  # fmt: skip
    lines += columns(rows)
    place = "nowhere near" if c["compute"] is None else f"at {c['compute']:.2e} GMACs"
    interval = "" if c["compute_ci95"] is None else f" (95%: {c['compute_ci95'][0]:.1e} to {c['compute_ci95'][1]:.1e})"
    beyond = ", which is extrapolated" if c["extrapolated"] else ""
    lines.append(
        f"the laws meet {place}{interval}{beyond}; at the largest compute of either {c['overtakes']} is ahead in {c['confidence']:.0%} of draws"
    )
    sure = c["ahead_with_95_from"]
    lines.append(
        f"{c['overtakes']} is ahead with 95% confidence " + ("at no compute of the runs" if sure is None else f"from {sure:.1e} GMACs on")
    )  # fmt: skip
    return "\n".join(lines)


def budget_text(found: dict[str, Any], shown: int = 8) -> str:
    """What to train, for people."""
    best = found["best"]
    lines = [
        f"{found['task']}, {found['metric']}, {found['family']}: {found['gpu_hours']:,g} GPU hours on {found['gpus']} × {found['gpu']}",
        f"train {best['model']} on {best['data']}, {short(best['samples_seen'])} samples seen: error "
        f"{best['error']:.3f} {between(best['error_ci95'])}, best in {best['best_in_draws']:.0%} of draws",
    ]
    lines += [f"  extrapolated: {what}" for what in best["extrapolated"]] or ["  nothing in it is extrapolated"]
    rows = [["model", "data", "samples seen", "error", "best in", "samples/s", "extrapolated"]]
    for c in found["candidates"][:shown]:
        low, high = c["samples_per_second_range"]
        rows.append([
            c["model"], c["data"], short(c["samples_seen"]), f"{c['error']:.3f} {between(c['error_ci95'])}", f"{c['best_in_draws']:.0%}",
            f"{c['samples_per_second']:,.0f} ({low:,.0f} to {high:,.0f})", "; ".join(dict.fromkeys(w.partition(":")[0] for w in c["extrapolated"])) or "no",
        ])  # fmt: skip
    return "\n".join([*lines, *columns(rows), f"speeds: {best['rate_from']}"])
