"""The command line of tools/bench_gpu.py."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from dsclip.bench.gpu.report import as_json, as_markdown
from dsclip.bench.gpu.runner import ROOT, Outcome, run_phases
from dsclip.bench.gpu.schedule import PHASES, TINY
from dsclip.bench.measure import environment
from dsclip.command_line import parser, run_tool, say
from dsclip.errors import RunFailed, UserError, did_you_mean
from dsclip.files import write_whole

EXAMPLE = "python tools/bench_gpu.py --minutes 10"


def main(argv: list[str] | None = None) -> None:
    """tools/bench_gpu.py."""
    p = parser("All that needs a GPU, measured once: a table with accept lines, written after each phase.", EXAMPLE)
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --tiny (default: cuda)")
    p.add_argument("--tiny", action="store_true", help="every phase with tiny shapes: does the bench itself work?")
    p.add_argument("--minutes", type=float, help="stop then; what decides most comes first (default: no limit)")
    p.add_argument("--only", nargs="+", metavar="PHASE", help=f"of: {', '.join(phase.name for phase in PHASES)}")
    p.add_argument(
        "--out",
        type=Path,
        help="the Markdown file; JSON and log go beside it (default: docs/benchmarks/DATE-CARD.md, with --tiny in runs/)",
    )
    arguments = p.parse_args(argv)
    arguments.command = shlex.join(["python", "tools/bench_gpu.py", *(sys.argv[1:] if argv is None else argv)])
    sys.exit(run_tool(bench, arguments))


def bench(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """See `as_json`. Raises RunFailed, with the table written, when a row misses its accept line or a phase failed."""
    a = arguments
    if a.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here; to see whether the bench works, run it with --device cpu --tiny")
    if a.device == "cpu" and not a.tiny:
        raise UserError("--device cpu needs --tiny: sizes for a GPU take hours on a CPU")
    if a.minutes is not None and not a.minutes > 0:
        raise UserError(f"--minutes is {a.minutes}; it must be greater than 0")
    phases = [p for p in (TINY if a.tiny else PHASES) if a.only is None or p.name in a.only]
    for name in a.only or ():
        if name not in {p.name for p in phases}:
            known = [p.name for p in (TINY if a.tiny else PHASES)]
            raise UserError(
                f"--only {name}: no such phase{' with --tiny' if a.tiny else ''}.{did_you_mean(name, known)}"
            )
    if a.out is not None and (a.out.suffix != ".md" or a.out.is_dir()):
        raise UserError(f"--out is {a.out}; it is the Markdown file: give a name that ends in .md")
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # a phase is a session of its own: it is ended on the way out
    card = environment()["device"] if a.device == "cuda" else "CPU, tiny"
    date = datetime.date.today().isoformat()
    name = f"{date}-{re.sub(r'[^A-Za-z0-9]+', '-', str(card)).strip('-').lower()}.md"
    out = a.out or ROOT / ("runs/bench_gpu" if a.tiny else "docs/benchmarks") / name
    out.parent.mkdir(parents=True, exist_ok=True)
    title = {"date": date, "card": card, "command": a.command, "tiny": a.tiny}
    log_path = out.with_suffix(".log")

    def write(outcomes: list[Outcome]) -> None:
        result = as_json(outcomes, a.device, title)
        write_whole(out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
        write_whole(out, as_markdown(result, log_path.name))

    with log_path.open("w", encoding="utf-8") as log:
        outcomes = run_phases(phases, a.device, a.tiny, a.minutes, log, write)
    result = as_json(outcomes, a.device, title)
    text = as_markdown(result, log_path.name)
    if result["missed"] or result["failed"]:
        say(text)
        raise RunFailed(
            f"{out}: missed: {', '.join(result['missed']) or 'nothing'}; failed: {', '.join(result['failed']) or 'nothing'}"
        )
    return result, text
