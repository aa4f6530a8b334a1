"""The command line of tools/compose.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dsclip.command_line import parser, run_tool
from dsclip.convert.dsclip_export import export_dsclip
from dsclip.errors import UserError
from dsclip.weights.combine import check_shares, opened
from dsclip.weights.difference import changed, compose, read_difference, write_difference


def main(argv: list[str] | None = None) -> None:
    """Parses, takes a difference or adds some, exits."""
    p = parser(
        "Keeps what a fine-tune changed most in a small file, and adds such files to their base.",
        "python tools/compose.py BASE --from TUNED --keep 0.05 --out delta.safetensors\n"
        "  python tools/compose.py BASE --add one.safetensors two.safetensors --out BOTH",
    )
    p.add_argument("base", metavar="BASE", help="the model that was fine-tuned: anything that evaluate.py takes")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--from", dest="tuned", metavar="TUNED", help="take its largest changes")
    what.add_argument("--add", nargs="+", type=Path, metavar="FILE", help="differences to add")
    p.add_argument("--keep", type=float, help="with --from: share of all parameters (default: 0.05)")
    p.add_argument("--shares", type=float, nargs="+", help="with --add: what each is multiplied by (default: 1)")
    p.add_argument("--out", required=True, type=Path, help="file of the difference, or folder of the model")
    sys.exit(run_tool(_run, p.parse_args(argv)))


def _run(a: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if a.tuned is None and a.keep is not None:
        raise UserError("--keep belongs to --from; leave it out")
    if a.add is None and a.shares is not None:
        raise UserError("--shares belongs to --add; leave it out")
    return _take(a) if a.add is None else _add(a)


def _take(a: argparse.Namespace) -> tuple[dict[str, Any], str]:
    keep = 0.05 if a.keep is None else a.keep
    if not 0 < keep <= 1:
        raise UserError(f"--keep is {keep}; it is a share of all parameters, more than 0 and at most 1")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with opened([a.base, a.tuned]) as (base, tuned):
        made = write_difference(a.out, base, tuned, keep)
    size = a.out.stat().st_size
    result = {"out": str(a.out), "kept": made.kept, "parameters": made.parameters, "bytes": size}
    text = f"{a.out}: {made.kept:,} of {made.parameters:,} parameters, {size / 1e6:.1f} MB"
    return result, f"{text}\n\nNext:\n  python tools/compose.py {a.base} --add {a.out} --out MODEL"


def _add(a: argparse.Namespace) -> tuple[dict[str, Any], str]:
    differences = [read_difference(path) for path in a.add]
    shares = a.shares or [1.0] * len(differences)
    check_shares(shares, len(differences), "differences")
    if len({path.resolve() for path in a.add}) < len(a.add):
        raise UserError("--add names a file twice; give it once, with a share of 2 if that is meant")
    with opened([a.base]) as [base]:
        export_dsclip(compose(base, differences, shares), a.out)
    count = changed(differences)
    again = sum(d.kept for d in differences) - count
    result = {
        "out": str(a.out), "differences": [str(d.path) for d in differences], "shares": shares,
        "changed": count, "changed_again": again,
    }  # fmt: skip
    text = f"{a.out}: {count:,} of {differences[0].parameters:,} parameters changed, {again:,} of them by more than one"
    return result, f"{text}\n\nNext:\n  python launchers/evaluate.py --model {a.out} --task zeroshot --data SHARDS"
