"""The command lines of tools/bench_step.py and tools/bench_loss.py."""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any, get_args

import torch

from dsclip.bench.measure import environment, in_process, product_tflops, utilisation
from dsclip.bench.peers import installed_peers
from dsclip.command_line import parser, run_tool, say
from dsclip.config.schema import Checkpointing
from dsclip.errors import UserError
from dsclip.model import resolve_preset
from dsclip.model.flops import forward_flops

STEP_EXAMPLE = "python tools/bench_step.py --preset ViT-B-32 --batch 64 --micro-batch 16"
GATHERS = ("all", "ring")
LOSS_EXAMPLE = "python tools/bench_loss.py --n 8192 --d 512"
KINDS = ("plain", "accumulated", "auto")  # auto: `batch.accumulation: auto`, which only dsclip has
# compiled: plain by torch.compile, on a GPU, where dsclip's always is.
PEER_KINDS = ("plain", "accumulated", "compiled")


def step_main(argv: list[str] | None = None) -> None:
    """tools/bench_step.py."""
    p = parser(
        "Whole optimizer steps: dsclip, transformers' CLIPModel and, where it is installed, OpenCLIP.", STEP_EXAMPLE
    )
    p.add_argument("--preset", default="ViT-B-32")
    p.add_argument("--batch", type=int, default=64, help="global batch (default: 64)")
    p.add_argument("--micro-batch", type=int, default=16, help="of the peers' accumulated step (default: 16 samples)")
    p.add_argument("--chunk-size", type=int, help="of dsclip's accumulated step (default: as many as --micro-batch)")
    p.add_argument("--steps", type=int, default=5, help="steps measured after two to warm up (default: 5)")
    p.add_argument(
        "--repeats", type=int, default=2, help="rounds over all trainers; the median step of all counts (default: 2)"
    )
    p.add_argument("--ds_config", default="zero1_bf16", help="dsclip's DeepSpeed JSON (default: zero1_bf16)")
    p.add_argument(
        "--checkpointing",
        default="auto",
        choices=get_args(Checkpointing),
        help="of dsclip's accumulated step (default: auto)",
    )
    sys.exit(run_tool(bench_step, p.parse_args(argv)))


def loss_main(argv: list[str] | None = None) -> None:
    """tools/bench_loss.py."""
    p = parser("One loss with its gradients: dsclip's in tiles, and dense with autograd.", LOSS_EXAMPLE)
    p.add_argument("--n", type=int, default=8192, help="global batch (default: 8192)")
    p.add_argument("--d", type=int, default=512, help="embedding width (default: 512)")
    p.add_argument("--repeats", type=int, default=5, help="the median counts, the first one aside (default: 5)")
    p.add_argument("--skip-dense", action="store_true", help="for N that the dense loss has no memory for")
    p.add_argument("--ranks", type=int, help="also over so many ranks: features gathered at once, and in a ring")
    sys.exit(run_tool(bench_loss, p.parse_args(argv)))


def bench_step(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """{"plain", "accumulated", "auto", "peers": {name: {"plain", "accumulated"}}}, each {"samples_per_second", "peak_mb"}.

    dsclip's have "planned_peak_mb" too. On a GPU peers are measured "compiled" as well, and "mfu" gives the plain step's
    share of the datasheet's peak, and of a matrix product measured in the same run, by the text tokens that were computed;
    "mfu_of_whole_contexts" counts captions as if they were not cut.
    """
    a = arguments
    resolve_preset(a.preset)  # here an unknown one is a sentence; in a process of its own a trace
    trainers = ["dsclip", *installed_peers()]
    kinds = PEER_KINDS if torch.cuda.is_available() else PEER_KINDS[:2]
    # Work of the same size at a time: layer-major accumulation needs no micro-batches where peers do.
    chunk_size = a.micro_batch if a.chunk_size is None else a.chunk_size
    if min(a.batch, a.micro_batch, chunk_size, a.steps, a.repeats) < 1:
        raise UserError("--batch, --micro-batch, --chunk-size, --steps and --repeats must be at least 1")
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(a.repeats):
        for trainer in trainers:
            for kind in KINDS if trainer == "dsclip" else kinds:
                settings = dict(trainer=trainer, preset=a.preset, batch=a.batch, steps=a.steps, kind=kind)
                if trainer == "dsclip":
                    settings |= {"ds_config": a.ds_config}
                    if kind == "accumulated":
                        settings |= {"chunk_size": chunk_size, "checkpointing": a.checkpointing}
                elif kind == "accumulated":
                    settings["micro_batch"] = a.micro_batch
                measured = in_process("dsclip.bench.step", settings)
                say(f"{trainer} {kind}: {measured['samples_per_second']:.1f} samples/s, {measured['peak_mb']:.0f} MB")
                found.setdefault((trainer, kind), []).append(measured)
    rows = {key: _of_all_rounds(rounds, a.batch) for key, rounds in found.items()}
    peers = {t: {k: rows[t, k] for k in kinds} for t in trainers[1:]}
    settings = {
        "preset": a.preset, "batch": a.batch, "micro_batch": a.micro_batch, "chunk_size": chunk_size,
        "gflops_per_sample": rows["dsclip", "plain"]["gflops_per_sample"],
    }  # fmt: skip
    ours = {k: rows["dsclip", k] for k in KINDS}
    result = {**settings, **ours, "peers": peers, "environment": environment()}
    if torch.cuda.is_available():
        product, rate = product_tflops("cuda"), ours["plain"]["samples_per_second"]
        result["mfu"] = utilisation(1e9 * settings["gflops_per_sample"] * rate, product)
        whole = 3 * sum(forward_flops(resolve_preset(a.preset)))
        result["mfu_of_whole_contexts"] = utilisation(whole * rate, product)
    return result, step_table(result)


def _of_all_rounds(rounds: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """One row of several rounds: the median step of all of them, and the highest peak."""
    seconds = [s for r in rounds for s in r["seconds"]]
    return rounds[0] | {
        "samples_per_second": batch / statistics.median(seconds), "seconds": seconds,
        "peak_mb": max(r["peak_mb"] for r in rounds),
    }  # fmt: skip


def bench_loss(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """{"tiled", "dense", with --ranks "all", "ring"}: {"seconds", "extra_peak_mb"}."""
    ranks = arguments.ranks
    if ranks is not None and (ranks < 2 or arguments.n % ranks or arguments.n < 8 * ranks):
        raise UserError(
            f"--ranks is {ranks}; give 2 or more, of which --n {arguments.n} is a multiple, 8 pairs a rank at least"
        )
    result: dict[str, Any] = {"n": arguments.n, "d": arguments.d, "ranks": ranks}
    for variant in ("tiled",) if arguments.skip_dense else ("tiled", "dense"):
        settings = dict(variant=variant, n=arguments.n, d=arguments.d, repeats=arguments.repeats)
        result[variant] = in_process("dsclip.bench.loss", settings)
    for gather in GATHERS if ranks is not None else ():
        settings = dict(gather=gather, n=arguments.n, d=arguments.d, repeats=arguments.repeats)
        result[gather] = in_process("dsclip.bench.loss_ranks", settings, ranks)
    return result | {"environment": environment()}, loss_table(result)


def step_table(result: dict[str, Any]) -> str:
    """Rows of trainers, with the ratio of dsclip to each."""
    lines = [f"{'':14} {'plain':>26} {'accumulated':>26}"]
    for name, row in {"dsclip": result, **result["peers"]}.items():
        cells = []
        for kind in ("plain", "accumulated"):
            rate = row[kind]["samples_per_second"]
            cells.append(
                f"{rate:7.1f}/s {row[kind]['peak_mb']:6.0f} MB {result[kind]['samples_per_second'] / rate:4.2f}x"
            )
        lines.append(f"{name:14} {cells[0]:>26} {cells[1]:>26}")
        if "compiled" in row:
            rate = row["compiled"]["samples_per_second"]
            ratio = result["plain"]["samples_per_second"] / rate
            lines.append(f"{'  compiled':14} {rate:7.1f}/s {row['compiled']['peak_mb']:6.0f} MB {ratio:4.2f}x")
    ours = [(kind, result[kind]) for kind in KINDS]
    lines.append(f"auto           {result['auto']['samples_per_second']:7.1f}/s: {result['auto']['schedule']}")
    lines += [f"planned {k:12} {r['planned_peak_mb']:6.0f} MB, {r['peak_mb']:6.0f} MB measured" for k, r in ours]
    if "mfu" in result:
        m = result["mfu"]
        sheet = "unknown" if m["datasheet"] is None else f"{m['datasheet']:.1%} of {m['datasheet_tflops']:.0f} TFLOP/s"
        lines.append(
            f"MFU plain      {sheet} (datasheet), {m['measured']:.1%} of {m['measured_tflops']:.0f} (a product)"
        )
    return "\n".join(lines)


def loss_table(result: dict[str, Any]) -> str:
    """Rows of variants."""
    names = {"tiled": "tiled", "dense": "dense"} | {g: f"{result['ranks']} ranks, {g}" for g in GATHERS}
    rows = [(name, result[key]) for key, name in names.items() if key in result]
    return "\n".join(f"{name:13} {r['seconds']:8.3f} s {r['extra_peak_mb']:9.1f} MB extra" for name, r in rows)
