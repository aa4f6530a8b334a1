"""The command line of tools/bench_data.py."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dsclip.bench.measure import environment, in_process, peak_mb, reset_peak
from dsclip.bench.remote import bench_remote
from dsclip.command_line import parser, run_tool, say
from dsclip.data import ShardWriter, load_tokenizer, resolve_shards
from dsclip.data.decoding.sample import IMAGE_EXTENSIONS, decode_image
from dsclip.data.reading.samples import read_shard
from dsclip.errors import UserError

EXAMPLE = "python tools/bench_data.py --shards 'data/photos/*.tar' --image-size 224"
WORKERS = {"dsclip_1_worker": 1, "dsclip_2_workers": 2}
LAION_SHARDS, LAION_SHARD_SIZE = 200_000, 10_000


def main(argv: list[str] | None = None) -> None:
    """tools/bench_data.py."""
    p = parser(
        "Samples a second and core of the whole input: dsclip, plain webdataset with PIL, and OpenCLIP where installed.",
        EXAMPLE,
    )
    p.add_argument(
        "--shards", help="folder, glob or brace expression (default: demo; with --latency-ms a set it writes)"
    )
    p.add_argument("--tokenizer", default="demo", help="folder or hub name (default: demo)")
    p.add_argument("--image-size", type=int, default=224)
    p.add_argument("--resize", metavar="WxH", help="first write the images anew at this size, such as 1024x768")
    p.add_argument("--samples", type=int, default=1500, help="of one of three stretches (default: 1500)")
    p.add_argument("--repeats", type=int, default=2, help="rounds over all pipelines, the best counts (default: 2)")
    p.add_argument(
        "--plan", action="store_true", help="instead: a manifest, an epoch and a position at LAION-2B's scale"
    )
    remote = p.add_argument_group("shards far away: the first batch and the stalls, from a loopback server")
    remote.add_argument("--latency-ms", type=float, metavar="MS", help="how late the server answers, such as 20")
    remote.add_argument("--batch", type=int, default=1024, help="global batch (default: 1024)")
    remote.add_argument("--workers", type=int, default=4, help="loader workers (default: 4)")
    remote.add_argument("--batches", type=int, default=20, help="batches to take (default: 20)")
    remote.add_argument(
        "--shuffle-unit", type=int, help="data.shuffle_unit (default: 1; large sets read shards in sequence)"
    )
    remote.add_argument("--read-ahead-mb", type=int, default=512, help="data.read_ahead_mb (default: 512)")
    sys.exit(run_tool(_chosen, p.parse_args(argv)))


def _chosen(a: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if a.plan:
        return plan_at_scale()
    if a.latency_ms is not None:
        names = (
            "latency_ms",
            "batch",
            "workers",
            "batches",
            "image_size",
            "tokenizer",
            "shuffle_unit",
            "read_ahead_mb",
        )
        return bench_remote(a.shards, **{name: getattr(a, name) for name in names})
    a.shards = a.shards or "demo"
    return bench(a)


def bench(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """{"dsclip", "plain", "open_clip"}: {"samples_per_second_per_core"}; "dsclip_1_worker", "dsclip_2_workers": in processes of their own.

    OpenCLIP's tokenizer and transform, on its reader's successor, are measured where it and torchvision are installed.
    """
    a = arguments
    if min(a.image_size, a.samples, a.repeats) < 1:
        raise UserError("--image-size, --samples and --repeats must be at least 1")
    resolve_shards(a.shards), load_tokenizer(a.tokenizer)  # wrong ones are named here, not in a process of their own
    if a.resize:
        with tempfile.TemporaryDirectory() as folder:
            write_resized(a.shards, Path(folder), a.resize)
            return bench(argparse.Namespace(**vars(a) | {"shards": folder, "resize": None}))
    variants = ["dsclip", "plain"]
    if importlib.util.find_spec("open_clip") and importlib.util.find_spec("torchvision"):
        variants.append("open_clip")
    best: dict[str, dict[str, Any]] = {}
    for _ in range(a.repeats):
        for name in [*variants, *WORKERS]:
            settings = dict(
                variant=name if name in variants else "dsclip", shards=a.shards, image_size=a.image_size,
                tokenizer=a.tokenizer, workers=WORKERS.get(name, 0), samples=a.samples,
            )  # fmt: skip
            measured = in_process("dsclip.bench.data", settings)
            say(f"{name}: {measured['samples_per_second']:.0f} samples/s")
            best[name] = max(best.get(name, measured), measured, key=lambda r: r["samples_per_second"])
    result = {**best, "image_size": a.image_size, "shards": a.shards, "environment": environment()}
    ours = best["dsclip"]["samples_per_second"]
    lines = [
        f"{name:18} {row['samples_per_second']:8.0f} samples/s  dsclip on one core is {ours / row['samples_per_second']:5.2f}x"
        for name, row in best.items()
    ]
    return result, "\n".join(lines)


def write_resized(shards: str, folder: Path, size: str) -> None:
    """The same samples with JPEGs of quality 90 and WxH pixels."""
    wide, cross, high = size.partition("x")
    if not (cross and wide.isdigit() and high.isdigit() and int(wide) and int(high)):
        raise UserError(f"--resize {size}: write it as 1024x768")
    with ShardWriter(folder, 1000) as writer:
        for shard in resolve_shards(shards):
            for raw in read_shard(shard, {}):
                image = decode_image(raw, 10**9).resize((int(wide), int(high)), Image.Resampling.LANCZOS)
                content = io.BytesIO()
                image.save(content, "JPEG", quality=90)
                members = {k: v for k, v in raw.members.items() if k not in IMAGE_EXTENSIONS}
                writer.write(raw.key, members | {"jpg": content.getvalue()})


def plan_at_scale() -> tuple[dict[str, Any], str]:
    """{"load_s", "epoch_s", "resume_s", "extra_peak_mb"} for 200,000 shards of 10,000 samples, from a real manifest."""
    from dsclip.data.order.exact import SetOrder
    from dsclip.data.shards.manifest import Entry, write_manifest
    from dsclip.data.shards.shard_set import open_shards

    with tempfile.TemporaryDirectory() as name:
        entries: list[Entry] = [
            {"name": f"{i:06d}.tar", "samples": LAION_SHARD_SIZE, "bytes": 327_000_000, "sha256": f"{i:064x}"}
            for i in range(LAION_SHARDS)
        ]
        write_manifest(Path(name), entries, {"base": "https://shards.example.org/laion"})
        del entries
        reset_peak()
        before, started = peak_mb(), time.perf_counter()
        shards = open_shards(f"{name}/manifest.json")
        loaded = time.perf_counter()
        order = SetOrder(shards.samples, global_batch=32768, streams=1024, seed=0, window=512)
        first = [order.draw(stream, 0) for stream in range(1024)]
        planned = time.perf_counter()
        drawn = np.random.default_rng(0).integers(3 * 10**6, 4 * 10**6, 1024)
        position = json.loads(json.dumps(drawn.tolist()))
        resumed = [order.draw(stream, place) for stream, place in enumerate(position)]
        done = time.perf_counter()
    result = {
        "samples": int(shards.samples.sum()), "load_s": loaded - started, "epoch_s": planned - loaded,
        "resume_s": done - planned, "total_s": done - started, "extra_peak_mb": peak_mb() - before,
        "different_places": len({*first, *resumed}), "state_bytes": len(json.dumps(position)),
    }  # fmt: skip
    text = (
        f"{result['samples']:,} samples: manifest {result['load_s']:.2f} s, epoch {result['epoch_s']:.2f} s, position "
        f"{result['resume_s']:.2f} s, {result['extra_peak_mb']:.0f} MB more, state of {result['state_bytes']:,} bytes"
    )
    return result, text
