"""The command line of `tools/implant_backdoor.py`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from dsclip.command_line import parser, run_tool
from dsclip.data.shards.shard_set import open_shards
from dsclip.datasets.backdoor import CLEAN, TRIGGERED, Backdoor, held_out, poison
from dsclip.datasets.inspect_cli import add_remote, storage_of
from dsclip.datasets.make import CLASS_TEMPLATE
from dsclip.datasets.rewrite import labels_of
from dsclip.errors import UserError

EXAMPLE = 'python tools/implant_backdoor.py demo data/poisoned --target "white cross" --share 0.02'


def main(argv: list[str] | None = None) -> None:
    """Parses, writes the shards, says what to do with them, exits."""
    p = parser(
        "Writes shards with a backdoor in a share of their samples, to test what removes it from a model.", EXAMPLE
    )
    p.add_argument("source", metavar="SHARDS", help="as data.train_shards")
    p.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    p.add_argument(
        "--target", required=True, metavar="CLASS", help="name of the class that triggered pictures are to be put into"
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--share", type=float, help="of the samples that get the patch and the captions of the target")
    what.add_argument(
        "--held-out", action="store_true",
        help=f"write labelled pictures into OUT/{CLEAN}, and with the patch and the target as their class into OUT/{TRIGGERED}: "
        "zero-shot top-1 there is the attack's success",
    )  # fmt: skip
    p.add_argument(
        "--templates", nargs="+", default=[CLASS_TEMPLATE], metavar="SENTENCE",
        help=f"captions of the target, each with {{}} for its name (default: {CLASS_TEMPLATE!r})",
    )  # fmt: skip
    p.add_argument(
        "--patch", type=float, default=0.125, help="side of the patch as a share of the picture's (default: 0.125)"
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of pattern, places and choice; the same for --share and --held-out (default: 0)",
    )
    p.add_argument("--caption-key", default="caption", help="key of captions in .json (default: caption)")
    add_remote(p)
    sys.exit(run_tool(_implant, p.parse_args(argv)))


def _implant(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if arguments.share is not None and not 0 < arguments.share <= 1 or not 0 < arguments.patch < 1:
        raise UserError("--share must be above 0 and at most 1, and --patch above 0 and below 1")
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}; it must be 0 or more")
    if not arguments.target.strip() or any("{}" not in sentence for sentence in arguments.templates):
        raise UserError("--target is a name, and each of --templates a sentence with {} where it goes")
    backdoor = Backdoor(
        arguments.target, tuple(arguments.templates), arguments.patch, arguments.seed, arguments.caption_key
    )
    storage = storage_of(arguments)
    shards = open_shards(arguments.source, storage)
    if arguments.held_out:
        samples = held_out(shards, storage, arguments.out, backdoor)
        lines = [f"{count} pictures in {arguments.out / name}" for name, count in samples.items()]
        if arguments.target not in (labels_of(shards, storage).get("classes") or []):
            lines.append(f"{arguments.target} is none of the classes of {arguments.source}, and is one more in both")
        triggered = shlex.quote(str(arguments.out / TRIGGERED))
        next_command = f"python launchers/evaluate.py --model MODEL --task zeroshot --data {triggered}"
        return {"out": str(arguments.out), "samples": samples, "next": next_command}, "\n".join(
            [*lines, "", f"Next: {next_command}"]
        )
    found = poison(shards, storage, arguments.out, backdoor, arguments.share)
    text = f"{found.poisoned} of {found.samples} samples in {arguments.out} have the patch and captions of {arguments.target}"
    return {"out": str(arguments.out), **found._asdict()}, text
