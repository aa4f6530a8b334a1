"""The command line of `tools/make_shards.py`."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsclip.command_line import parser, run_tool
from dsclip.datasets.make import Summary, make_shards
from dsclip.datasets.ready_recipe import folder_of, train_command
from dsclip.errors import UserError

TOKENS = 4000  # of a tokenizer for a set of one's own; our guess
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
        metavar="SHARE",
        help="share of the images for OUT/val, the rest goes to OUT/train; 0: all in OUT (default: 0.1, or SRC's own splits)",
    )
    p.add_argument("--size", type=int, default=None, help="resize larger images to this shorter side (default: keep)")
    p.add_argument(
        "--tokenizer-size", type=int, metavar="TOKENS",
        help=f"of the tokenizer that is trained on the captions, in OUT/tokenizer (default: {TOKENS})",
    )  # fmt: skip
    p.add_argument("--tokenizer", metavar="NAME", help="train none, and let the recipe use this folder or hub name")
    p.add_argument("--encoding", default="utf-8", help="of captions.tsv, such as latin-1 (default: utf-8)")
    sys.exit(run_tool(_make, p.parse_args(argv)))


def _make(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if (
        arguments.shard_size < 1
        or not 0 <= (arguments.holdout or 0) < 1
        or (arguments.size is not None and arguments.size < 1)
    ):
        raise UserError("--shard-size and --size must be at least 1, and --holdout a share in [0, 1)")
    if arguments.tokenizer is not None and arguments.tokenizer_size is not None:
        raise UserError("--tokenizer uses a tokenizer and --tokenizer-size trains one; give one of them")
    trained = None if arguments.tokenizer else arguments.tokenizer_size or TOKENS
    summary = make_shards(
        arguments.source,
        arguments.out,
        shard_size=arguments.shard_size,
        holdout=arguments.holdout,
        size=arguments.size,
        tokenizer_size=trained,
        tokenizer=arguments.tokenizer,
        encoding=arguments.encoding,
    )
    lines = [f"{count} samples in {folder_of(arguments.out, split)}" for split, count in summary.samples.items()]
    if arguments.holdout is None and summary.held_out:
        lines.append(
            f"{summary.held_out:.0%} of the images were held out for evaluation; --holdout 0 keeps all together"
        )
    if summary.classes:
        lines.append(
            f"{len(summary.classes)} classes: {', '.join(summary.classes[:8])}{' ...' if len(summary.classes) > 8 else ''}"
        )
    lines += [f"left out: {count} {reason}" for reason, count in summary.skipped.items()]
    lines += [
        f"{what} in {path}" for what, path in (("tokenizer", summary.tokenizer), ("recipe", summary.recipe)) if path
    ]
    lines += ["", "Next:", f"  {_next_command(arguments.out, summary)}"]
    result = {k: v for k, v in asdict(summary).items() if k != "sides"}
    samples = {split or "all": count for split, count in summary.samples.items()}
    return {
        "out": str(arguments.out),
        **result,
        "samples": samples,
        "next": _next_command(arguments.out, summary),
    }, "\n".join(lines)


def _next_command(out: Path, summary: Summary) -> str:
    if summary.recipe:
        return train_command(Path(summary.recipe))
    split, task = next(iter(summary.samples)), "zeroshot" if summary.classes else "retrieval"
    return f"python launchers/evaluate.py --model MODEL --task {task} --data {shlex.quote(str(folder_of(out, split)))}"
