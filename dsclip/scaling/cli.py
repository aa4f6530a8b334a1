"""The command line of tools/scaling_laws.py."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from dsclip.command_line import parser, run_tool
from dsclip.errors import UserError, did_you_mean
from dsclip.files import write_whole
from dsclip.scaling.bottleneck import Series, series
from dsclip.scaling.budget import decide
from dsclip.scaling.compare import compare
from dsclip.scaling.drawing import Drawing
from dsclip.scaling.figures import bottleneck_figure, scaling_figure
from dsclip.scaling.frontier import Method
from dsclip.scaling.law import PARAMETERS
from dsclip.scaling.page import page
from dsclip.scaling.points import PUBLISHED, Point, Table, groups, read_csv
from dsclip.scaling.report import as_json, budget_text, comparison_text, text
from dsclip.scaling.runs import read_runs
from dsclip.scaling.study import FamilyFit, fit_family

EXAMPLE = "python tools/scaling_laws.py published --out scaling --compare openclip openai"


def main(argv: list[str] | None = None) -> None:
    """tools/scaling_laws.py."""
    p = parser("Scaling laws of runs: error against compute, with intervals, and what to train next.", EXAMPLE)
    p.add_argument(
        "sources", nargs="*", default=[PUBLISHED[0]], metavar="SOURCE",
        help="CSV files, run folders or folders of runs; `published`: Cherti et al. 2023 (default); `published2025`: Nezhurina et al. 2025",
    )  # fmt: skip
    p.add_argument("--task", help="only points of this test set")
    p.add_argument("--metric", help="only this metric, such as acc1")
    p.add_argument("--family", default="runs", help="name of the family that run folders make up (default: runs)")
    p.add_argument("--by-data", action="store_true", help="a family for each set of training data")
    p.add_argument(
        "--method", choices=get_args(Method),
        help="study: the lowest error in each of 5 bins; pareto: runs that no other beats; all (default: study from 10 runs on)",
    )  # fmt: skip
    p.add_argument(
        "--at", type=float, nargs="+", default=[], metavar="GMACS", help="predict the error at these computes"
    )
    p.add_argument(
        "--form", choices=(*PARAMETERS, "best"), default="power",
        help="law that predictions, comparisons and figures use; best: of the lowest AICc (default: power)",
    )  # fmt: skip
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two families at equal compute")
    p.add_argument(
        "--budget", type=float, metavar="GPU_HOURS", help="what to train with so many GPU hours; needs --gpu"
    )
    p.add_argument("--gpu", help="the card of --budget, such as H100")
    p.add_argument("--gpus", type=int, default=8, help="how many of them at a time (default: 8)")
    p.add_argument("--batch", type=int, default=2048, help="global batch of --budget (default: 2048)")
    p.add_argument("--draws", type=int, default=1000, help="resamples of the runs (default: 1000)")
    p.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    p.add_argument("--out", type=Path, metavar="DIR", help="write figures (SVG and PNG) and index.html there")
    sys.exit(run_tool(scaling_laws, p.parse_args(argv)))


def scaling_laws(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """{"fits": [{"task", "family", "alpha", "beta", …}], "bottlenecks", "left_out", …, "compare", "budget" where asked for}."""
    a = arguments
    _check(a)
    table = _read(a)
    found = groups(table.points)
    fits: list[FamilyFit] = []
    unfitted = []
    for (task, metric, family), runs in found.items():
        fit = fit_family(runs, method=a.method, form=a.form, draws=a.draws, seed=a.seed)
        if fit is None:
            reason = f"a law needs two different computes; points: {len(runs)}"
            unfitted.append({"task": task, "metric": metric, "family": family, "reason": reason})
        else:
            fits.append(fit)
    rows = {_name(f): series(f.runs) for f in fits}
    result: dict[str, Any] = {
        "sources": a.sources, "points": len(table.points), "fits": [as_json(f, a.at, a.method, a.form) for f in fits],
        "unfitted": unfitted, "left_out": [asdict(left) for left in table.left_out],
        "bottlenecks": [{"of": _name(f), **s.described(f.power.law.alpha)} for f in fits for s in rows[_name(f)]],
    }  # fmt: skip
    words = [text(result, {name: found_series for name, found_series in rows.items() if found_series})]
    words += [f"no law: {u['task']}, {u['metric']}, {u['family']}: {u['reason']}" for u in unfitted]
    if a.compare:
        result["compare"] = _compare(fits, *a.compare)
        words += ["", *(comparison_text(c) for c in result["compare"])]
    if a.budget is not None:
        result["budget"] = _budget(a, found)
        words += ["", *(budget_text(b) for b in result["budget"])]
    if a.out is not None:
        result["files"] = _write(a.out, result, fits, rows)
        words += ["", f"{len(result['files']) - 1} figures and the page {result['files'][-1]} are written"]
    return result, "\n".join(words)


def _check(a: argparse.Namespace) -> None:
    for name in ("budget", "gpus", "batch", "draws", *(["at"] if a.at else [])):
        values = getattr(a, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name} is {value}; it must be greater than 0")
    if (a.budget is None) != (a.gpu is None):
        raise UserError(
            "--budget and --gpu belong together: GPU hours, and of which card, such as --budget 1000 --gpu H100"
        )
    if a.draws < 40:
        raise UserError(f"--draws is {a.draws}; 95% of fewer than 40 draws says nothing")
    if a.seed < 0:
        raise UserError(f"--seed is {a.seed}; it must be 0 or more")
    if a.out is not None and a.out.exists() and not a.out.is_dir():
        raise UserError(f"--out {a.out} is no folder")


def _read(a: argparse.Namespace) -> Table:
    table = Table()
    for source in a.sources:
        folder = source not in PUBLISHED and Path(source).is_dir()
        table.extend(read_runs(Path(source), a.family) if folder else read_csv(source))
    for name, attribute in (("--task", "task"), ("--metric", "metric")):
        wanted, known = getattr(a, attribute), sorted({getattr(p, attribute) for p in table.points})
        if wanted is not None and wanted not in known:
            raise UserError(
                f"{name} {wanted}: no points of it.{did_you_mean(wanted, known)} There are: {', '.join(known)}"
            )
        table.points = [p for p in table.points if wanted is None or getattr(p, attribute) == wanted]
    if a.by_data:
        table.points = [replace(p, family=p.data or p.family) for p in table.points]
    return table


def _compare(fits: Sequence[FamilyFit], a: str, b: str) -> list[dict[str, Any]]:
    known = sorted({f.family for f in fits})
    for name in (a, b):
        if name not in known:
            raise UserError(
                f"--compare {name}: no family with a law.{did_you_mean(name, known)} There are: {', '.join(known)}"
            )
    if a == b:
        raise UserError(f"--compare {a} {b}: give two different families of: {', '.join(known)}")
    pairs = [
        (x, y)
        for x in fits
        for y in fits
        if (x.family, y.family) == (a, b) and (x.task, x.metric) == (y.task, y.metric)
    ]
    if not pairs:
        raise UserError(f"--compare {a} {b}: no task has points of both")
    return [compare(x, y) for x, y in pairs]


def _budget(a: argparse.Namespace, found: dict[tuple[str, str, str], list[Point]]) -> list[dict[str, Any]]:
    """For every family and task whose runs vary model and samples seen; an error where there is none."""
    results, problems = [], []
    for runs in found.values():
        try:
            results.append(decide(runs, a.budget, a.gpu, gpus=a.gpus, batch=a.batch, draws=a.draws, seed=a.seed))
        except UserError as error:
            if not str(error).startswith("--budget needs"):
                raise
            problems.append(str(error))
    if not results:
        raise UserError(problems[0] if problems else "--budget: there are no points")
    return results


def _write(out: Path, result: dict[str, Any], fits: Sequence[FamilyFit], rows: dict[str, list[Series]]) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Drawing] = {}
    for task, metric in dict.fromkeys((f.task, f.metric) for f in fits):
        drawings[f"scaling {task} {metric}"] = scaling_figure([f for f in fits if (f.task, f.metric) == (task, metric)])
    for fit in fits:
        if rows[_name(fit)]:
            name = f"bottleneck {fit.task} {fit.metric} {fit.family}"
            drawings[name] = bottleneck_figure(_name(fit), rows[_name(fit)], percent="loss" not in fit.metric)
    files = []
    for name, drawing in drawings.items():
        path = out / re.sub(r"[^\w.-]+", "_", name.replace("@", "_at_"))
        drawing.write(path)
        files += [f"{path}.svg", f"{path}.png"]
    write_whole(out / "index.html", page(result, list(drawings.values())))
    return [*files, str(out / "index.html")]


def _name(fit: FamilyFit) -> str:
    return f"{fit.task}, {fit.metric}, {fit.family}"
