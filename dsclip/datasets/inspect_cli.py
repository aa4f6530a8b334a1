"""The command lines of tools/index_shards.py and tools/check_data.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dsclip.command_line import parser, run_tool, say
from dsclip.config.data_section import DataSection
from dsclip.data.sources.storage import Storage
from dsclip.datasets.check import Report, check_data
from dsclip.datasets.index import index_shards, problem_counts
from dsclip.errors import UserError

INDEX_EXAMPLE = "python tools/index_shards.py data/cc12m"
CHECK_EXAMPLE = "python tools/check_data.py data/photos --sheet pairs.png"


def index_main(argv: list[str] | None = None) -> None:
    """tools/index_shards.py."""
    p = parser(
        "Writes an index for each shard and a manifest for all: exact order, exact resume, random access.",
        INDEX_EXAMPLE,
    )
    p.add_argument(
        "shards", metavar="SHARDS", help="folder, glob, brace expression, or their https://, s3://, gs:// address"
    )
    p.add_argument(
        "out", metavar="OUT", type=Path, nargs="?", help="folder for indexes and manifest (default: the shards')"
    )
    add_remote(p)
    sys.exit(run_tool(_index, p.parse_args(argv)))


def check_main(argv: list[str] | None = None) -> None:
    """tools/check_data.py."""
    p = parser(
        "Makes every sample as training does with these settings and reports failures, sizes, captions and duplicates.",
        CHECK_EXAMPLE,
    )
    p.add_argument("shards", metavar="SHARDS", help="as data.train_shards")
    p.add_argument("--caption-key", default="caption", help="key of captions in .json (default: caption)")
    p.add_argument("--group-key", help="as data.group_key")
    p.add_argument("--hard-negatives", metavar="KEY", help="read hard negatives too; KEY as data.negative_key")
    p.add_argument("--decoder", choices=["fast", "exact"], default="fast", help="as data.decoder (default: fast)")
    p.add_argument("--image-size", type=int, default=224, help="of the crops (default: 224)")
    p.add_argument("--max-image-pixels", type=int, default=64_000_000, help="as data.max_image_pixels")
    p.add_argument("--max-sample-bytes", type=int, default=1 << 26, help="as data.max_sample_bytes")
    p.add_argument("--max-samples", type=int, help="look at the first so many (default: all)")
    p.add_argument(
        "--max-bad", type=float, default=0.0, metavar="SHARE", help="exit code 1 above this share (default: 0)"
    )
    p.add_argument("--sheet", type=Path, metavar="PNG", help="write a picture of 32 pairs")
    add_remote(p)
    sys.exit(run_check(p.parse_args(argv)))


def add_remote(p: argparse.ArgumentParser) -> None:
    """Flags that say how shards behind addresses are read, as data.trusted_hosts and data.retries do."""
    p.add_argument("--trusted-host", action="append", default=[], metavar="HOST", help="may be private or plain http")
    p.add_argument("--retries", type=int, default=5, help="further attempts at a remote read (default: 5)")


def storage_of(arguments: argparse.Namespace) -> Storage:
    """The storage that these flags describe."""
    return Storage(tuple(arguments.trusted_host), arguments.retries)


def _index(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    indexed = index_shards(arguments.shards, arguments.out, storage_of(arguments), progress=say)
    samples = sum(e["samples"] for e in indexed.entries)
    counts = problem_counts(indexed.problems)
    lines = [
        f"{len(indexed.entries)} shards with {samples:,} samples, {sum(e['bytes'] for e in indexed.entries):,} bytes"
    ]
    lines += [
        f"  {name}: {', '.join(f'{n} {reason}' for reason, n in p.items())}" for name, p in indexed.problems.items()
    ]
    lines += [f"  {name}: left out, {reason}" for name, reason in indexed.unreadable.items()]
    target = arguments.out or arguments.shards
    lines += ["", f"Next: tools/check_data.py {target}, or train with data.train_shards={target}"]
    if indexed.unreadable:
        names = ", ".join(list(indexed.unreadable)[:5])
        say(f"dsclip: {len(indexed.unreadable)} shards could not be read and are not in the manifest: {names}")
    result = {"shards": len(indexed.entries), "samples": samples, "problems": counts, "unreadable": indexed.unreadable}
    return result, "\n".join(lines)


def run_check(arguments: argparse.Namespace) -> int:
    """The exit code: 0, 1 when more samples are bad than --max-bad allows or a shard is damaged, 2 for wrong input."""
    verdict = {}

    def check(a: argparse.Namespace) -> tuple[dict[str, Any], str]:
        if not 0 <= a.max_bad <= 1 or (a.max_samples is not None and a.max_samples < 1):
            raise UserError("--max-bad is a share in [0, 1], and --max-samples at least 1")
        if a.sheet is not None and (
            a.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg") or not a.sheet.parent.is_dir()
        ):
            raise UserError(f"--sheet {a.sheet}: give a .png or .jpg file in a folder that exists")
        if min(a.image_size, a.max_image_pixels, a.max_sample_bytes) < 1:
            raise UserError("--image-size, --max-image-pixels and --max-sample-bytes must be at least 1")
        data = DataSection(
            caption_key=a.caption_key, group_key=a.group_key, decoder=a.decoder, max_image_pixels=a.max_image_pixels,
            max_sample_bytes=a.max_sample_bytes, negative_key=a.hard_negatives or "negatives",
        )  # fmt: skip
        report = check_data(
            a.shards, storage_of(a), data=data, image_size=a.image_size, hard_negatives=a.hard_negatives is not None,
            most=a.max_samples, sheet=a.sheet,
        )  # fmt: skip
        share = report.bad.total() / max(1, min(report.samples, a.max_samples or report.samples))
        verdict["failed"] = share > a.max_bad or bool(report.damage)
        return report.as_dict() | {"ok": not verdict["failed"]}, text(report, share, a)

    return run_tool(check, arguments) or int(verdict["failed"])


def text(report: Report, share: float, arguments: argparse.Namespace) -> str:
    """The report for people."""
    summary = report.as_dict()
    lines = [f"{report.samples:,} samples, {report.usable:,} usable, {report.captions:,} captions"]
    lines += [f"  {count:8,} {reason}" for reason, count in report.bad.most_common()]
    lines += [
        f"  {report.duplicate_images:8,} repeated images",
        f"  {report.duplicate_captions:8,} repeated captions",
        f"  {report.slow_decoded:8,} JPEGs with errors, which only Pillow reads",
        "",
    ]
    lines.append(f"{'':14}" + "".join(f"{name:>10}" for name in ("least", "5 %", "median", "95 %", "most")))
    for name in ("widths", "heights", "image_bytes", "caption_words"):
        lines.append(f"{name.replace('_', ' '):14}" + "".join(f"{v:10,.0f}" for v in summary[name].values()))
    for name, reasons in summary["worst_shards"].items():
        lines.append(f"{name}: " + ", ".join(f"{n} {reason}" for reason, n in reasons.items()))
    lines += [f"{name}: {lost}" for name, lost in report.damage.items()]
    if arguments.sheet:
        lines.append(f"pairs to look at: {arguments.sheet}")
    verdict = "more than" if share > arguments.max_bad else "within"
    lines.append(f"{share:.2%} bad, {verdict} the allowed {arguments.max_bad:.2%}")
    return "\n".join(lines)
