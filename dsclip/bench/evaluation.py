"""How soon an evaluation set of many small images is open, and how fast its images are decoded. `python -m dsclip.bench.evaluation JSON`."""

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
import torch
from PIL import Image
from torch import Tensor

from dsclip.bench.evaluation_peer import NEEDED, PEERS, compare
from dsclip.bench.measure import environment, in_process
from dsclip.command_line import parser, run_tool, say
from dsclip.data import ShardWriter, build_eval_dataset
from dsclip.errors import UserError
from dsclip.evaluate import Embedder
from dsclip.losses import SingleRank

EXAMPLE = "python tools/bench_evaluation.py --samples 50000"
SHARD_SIZE, CLASSES, PICTURES = 5000, 100, 64


def main(argv: list[str] | None = None) -> None:
    """tools/bench_evaluation.py."""
    p = parser("How soon an evaluation set is open, and how fast its images are decoded.", EXAMPLE)
    p.add_argument("--samples", type=int, default=50_000, help="of the set that is written (default: 50000)")
    p.add_argument("--shards", help="instead: a set of yours, a folder, glob or brace expression")
    p.add_argument("--image-size", type=int, default=64)
    p.add_argument("--decode", type=int, default=2000, help="images that are decoded (default: 2000)")
    p.add_argument("--repeats", type=int, default=3, help="the best counts (default: 3)")
    for peer, what in (
        ("transformers", "in a loop with transformers"),
        ("clip-benchmark", "in CLIP_benchmark with OpenCLIP's model"),
    ):
        p.add_argument(
            f"--beside-{peer}",
            type=int,
            metavar="IMAGES",
            help=f"instead: zero-shot and retrieval on so many images with ViT-B/32, and the same {what}",
        )
    sys.exit(run_tool(bench, p.parse_args(argv)))


def bench(a: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """{"samples", "open_s", "first_image_s", "images_per_second", "shards", "environment"}, each in a process of its own.

    first_image_s: from the call that opens the set until its first image is decoded. images_per_second: of one rank, through
    the same threads as in an evaluation, without a model.
    """
    if min(a.samples, a.image_size, a.decode, a.repeats) < 1:
        raise UserError("--samples, --image-size, --decode and --repeats must be at least 1")
    for peer in PEERS:
        if (images := getattr(a, f"beside_{peer}")) is not None:
            return _beside(peer, images, a.repeats)
    if a.shards is None:
        with tempfile.TemporaryDirectory() as folder:
            say(f"writing {a.samples} images")
            write_small_images(Path(folder), a.samples)
            return bench(argparse.Namespace(**vars(a) | {"shards": folder}))
    runs = []
    for _ in range(a.repeats):
        runs.append(in_process(__spec__.name, dict(shards=a.shards, image_size=a.image_size, decode=a.decode)))
        say(f"open after {runs[-1]['open_s']:.2f} s")
    best = {name: pick(run[name] for run in runs) for name, pick in PICK.items()}
    result = {"samples": runs[0]["samples"], **best, "shards": a.shards, "environment": environment()}
    text = (
        f"{result['samples']:,} samples: open after {best['open_s']:.2f} s, first image after {best['first_image_s']:.2f} s, "
        f"then {best['images_per_second']:.0f} images/s"
    )
    return result, text


def _beside(peer: str, images: int, repeats: int) -> tuple[dict[str, Any], str]:
    if images < 1:
        raise UserError(f"--beside-{peer.replace('_', '-')} must be at least 1")
    if missing := [
        name for name in (n.partition(".")[0] for n in NEEDED[peer]) if importlib.util.find_spec(name) is None
    ]:
        raise UserError(f"{' and '.join(missing)} can't be imported here; install what is to be measured beside dsclip")
    found = compare(images, repeats, peer)
    ours, theirs = found["dsclip"], found[peer]
    text = (
        f"zero-shot and retrieval on {images:,} images: {found['times_as_fast']:.2f} times as fast as {NAMES[peer]} "
        f"({ours['cpu_s']:.1f} s of a core instead of {theirs['cpu_s']:.1f}) in {found['memory']:.2f} of its memory "
        f"({ours['peak_mb']:.0f} MB); the images of a second task cost {ours['second_task_share']:.1%} of the first's"
    )
    return found | {"images": images, "environment": environment()}, text


NAMES = {"transformers": "a loop with transformers", "clip_benchmark": "CLIP_benchmark"}

PICK = {"open_s": min, "open_cpu_s": min, "first_image_s": min, "images_per_second": max}


def write_small_images(folder: Path, samples: int) -> None:
    """Labelled JPEGs of 64 × 64 noise with a caption each: `.jpg`, `.json` and `.cls`."""
    pictures = []
    for seed in range(PICTURES):
        content = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(content, "JPEG", quality=80)
        pictures.append(content.getvalue())
    classes = [f"class {i}" for i in range(CLASSES)]
    with ShardWriter(folder, SHARD_SIZE, classes=classes, templates=["a photo of a {}."]) as writer:
        for i in range(samples):
            text = json.dumps({"caption": [f"a photo of class {i % CLASSES}, number {i}"]}).encode()
            members = {"jpg": pictures[i % PICTURES], "json": text, "cls": str(i % CLASSES).encode()}
            writer.write(f"{i:08d}", members)


def measure(shards: str, image_size: int, decode: int) -> dict[str, float]:
    """One opening and one pass over the first `decode` images."""
    started, cpu = time.perf_counter(), time.process_time()
    dataset = build_eval_dataset(shards, image_size=image_size)
    opened, opened_cpu = time.perf_counter(), time.process_time()
    dataset.image(0)
    first = time.perf_counter()
    embedder = Embedder(_first_pixel, _first_pixel, _no_tokens, SingleRank(), context_length=1, batch_size=64)
    indices = list(range(min(decode, len(dataset))))
    decoding = time.perf_counter()
    embedder.images(dataset, indices)
    done = time.perf_counter()
    return {
        "samples": len(dataset), "open_s": opened - started, "open_cpu_s": opened_cpu - cpu, "first_image_s": first - started,
        "images_per_second": len(indices) / (done - decoding),
    }  # fmt: skip


def _first_pixel(images: Tensor) -> Tensor:
    """An encoder that costs nothing."""
    return images[:, 0, 0, :1]


def _no_tokens(captions: list[str], context_length: int) -> Tensor:
    return torch.zeros(len(captions), context_length, dtype=torch.int64)


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
