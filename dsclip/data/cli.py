"""The command line of `tools/make_shards.py`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from dsclip.command_line import parser, run_tool
from dsclip.data.make import make_shards
from dsclip.errors import UserError

EXAMPLE = "python tools/make_shards.py photos.zip data/photos --holdout 0.2"


def main(argv: list[str] | None = None) -> None:
    """Parses, writes the shards, prints where they are, exits."""
    p = parser(
        "Writes webdataset shards from a folder or zip with a captions.tsv, or with one folder a class.", EXAMPLE
    )
    p.add_argument("source", metavar="SRC", type=Path, help="folder or .zip")
    p.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    p.add_argument("--shard-size", type=int, default=1000, help="samples a shard (default: 1000)")
    p.add_argument(
        "--holdout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the images for OUT/val, the rest goes to OUT/train",
    )
    p.add_argument("--size", type=int, default=None, help="resize larger images to this shorter side (default: keep)")
    p.add_argument(
        "--tokenizer-size", type=int, metavar="TOKENS", help="also train a tokenizer on the captions, in OUT/tokenizer"
    )
    sys.exit(run_tool(_make, p.parse_args(argv)))


def _make(arguments: argparse.Namespace) -> tuple[dict, str]:
    if (
        arguments.shard_size < 1
        or not 0 <= arguments.holdout < 1
        or (arguments.size is not None and arguments.size < 1)
    ):
        raise UserError("--shard-size and --size must be at least 1, and --holdout a share in [0, 1)")
    summary = make_shards(
        arguments.source,
        arguments.out,
        shard_size=arguments.shard_size,
        holdout=arguments.holdout,
        size=arguments.size,
        tokenizer_size=arguments.tokenizer_size,
    )
    lines = [f"{count} samples in {_folder(arguments.out, split)}" for split, count in summary.samples.items()]
    if summary.classes:
        lines.append(
            f"{len(summary.classes)} classes: {', '.join(summary.classes[:8])}{' ...' if len(summary.classes) > 8 else ''}"
        )
    lines += [f"left out: {count} {reason}" for reason, count in summary.skipped.items()]
    if summary.tokenizer:
        lines.append(f"tokenizer in {summary.tokenizer}; use it with data.tokenizer={summary.tokenizer}")
    first = _folder(arguments.out, next(iter(summary.samples)))
    lines += [
        "",
        "Next:",
        f"  deepspeed launchers/train.py --ds_config ds_configs/zero3_bf16.json --config RECIPE.yaml data.train_shards={first}",
    ]
    return {"out": str(arguments.out), **asdict(summary)}, "\n".join(lines)


def _folder(out: Path, split: str) -> Path:
    return out if split == "all" else out / split
