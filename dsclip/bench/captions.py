"""The towers on captions as long as the web's: in the order of the samples, and sorted. `python -m dsclip.bench.captions JSON`."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the launcher does; before torch allocates

import torch
from torch import Tensor

from dsclip.bench.measure import environment, in_process, seconds_of
from dsclip.bench.step import make_batch
from dsclip.command_line import parser, run_tool
from dsclip.engine.cpu_bf16 import speed_up_bf16
from dsclip.errors import UserError
from dsclip.model import Captions, Clip, ClipConfig, resolve_preset
from dsclip.model.captions import cut_captions, end_positions, padded_length

EXAMPLE = "python tools/bench_captions.py --preset ViT-B-32 --batch 64"

# Words of a caption of CC12M: mean, standard deviation and bounds (Changpinyo et al. 2021), mean and deviation quoted from
# memory. Without a published distribution, lengths are drawn from the log-normal with these two, a token a word.
CC12M_WORDS = (20.2, 16.3, 3, 256)


def web_captions(n: int, context: int, generator: torch.Generator) -> Tensor:
    """Where the end tokens of n captions stand, [n]: words behind a begin token, cut at the context as tokenizers do."""
    mean, deviation, low, high = CC12M_WORDS
    variance = torch.tensor(1 + (deviation / mean) ** 2).log()
    normal = torch.randn(n, generator=generator)
    words = (torch.tensor(mean).log() - variance / 2 + variance.sqrt() * normal).exp().round().clamp(low, high)
    return (words.long() + 1).clamp_max(context - 1)


def unsorted(tokens: Tensor, config: ClipConfig, chunk_size: int | None, device: torch.device) -> Captions:
    """Captions in the order of their samples, each chunk as long as its longest: what sorting is compared with."""
    ends = end_positions(tokens, config).split(chunk_size or len(tokens))
    chunks = tokens.split(chunk_size or len(tokens))
    lengths = [padded_length(int(e.max()) + 1, tokens.shape[1]) for e in ends]
    cut = tuple(c[:, :length].to(device) for c, length in zip(chunks, lengths, strict=True))
    return Captions(cut, tuple(e.to(device) for e in ends), None)


def measure(preset: str, batch: int, chunk_size: int | None, repeats: int) -> dict[str, Any]:
    """{"sorted", "unsorted": {"samples_per_second", "tokens_per_caption", "chunks"}, "ratio", "needed_tokens"}.

    Forward and backward of both towers in bf16, medians, the two taking turns.
    """
    speed_up_bf16()
    config = resolve_preset(preset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Clip(config).to(device, torch.bfloat16)
    data = make_batch(config, batch, 0)
    ends = web_captions(batch, config.context_length, torch.Generator().manual_seed(0))
    places = torch.arange(config.context_length)
    tokens = data.tokens.clamp_min(1).masked_fill(data.tokens == config.eot_token_id, 1)
    tokens = tokens.masked_fill(places > ends[:, None], 0).masked_fill(places == ends[:, None], config.eot_token_id)
    images = data.images.to(device)
    ways: dict[str, Callable[[], Captions]] = {
        "unsorted": lambda: unsorted(tokens, config, chunk_size, device),
        "sorted": lambda: cut_captions(tokens, config, chunk_size, device),
    }

    def step(captions: Callable[[], Captions]) -> None:
        image, text = model(images, captions(), chunk_size=chunk_size)
        (image * text).sum().backward()
        model.zero_grad()

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name, captions in ways.items():
            seconds[name] += seconds_of(partial(step, captions), 1, warm_up=0 if turn else 1)
    found: dict[str, Any] = {}
    for name, captions in ways.items():
        chunks = captions().chunks
        found[name] = {
            "samples_per_second": batch / statistics.median(seconds[name]),
            "tokens_per_caption": sum(c.numel() for c in chunks) / batch,
            "chunks": [list(c.shape) for c in chunks],
        }
    found["ratio"] = found["sorted"]["samples_per_second"] / found["unsorted"]["samples_per_second"]
    found["needed_tokens"] = (end_positions(tokens, config) + 1).float().mean().item()
    return found


def captions_main(argv: list[str] | None = None) -> None:
    """tools/bench_captions.py."""
    p = parser("Both towers on captions as long as CC12M's: in the order of the samples, and sorted.", EXAMPLE)
    p.add_argument("--preset", default="ViT-B-32")
    p.add_argument("--batch", type=int, default=64, help="captions of a micro-batch (default: 64)")
    p.add_argument("--chunk-size", type=int, help="captions that go through a block at a time (default: all)")
    p.add_argument("--repeats", type=int, default=5, help="measured passes of each way (default: 5)")
    sys.exit(run_tool(bench_captions, p.parse_args(argv)))


def bench_captions(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What `measure` gives, with the environment, and a line for each way."""
    a = arguments
    resolve_preset(a.preset)
    if min(a.batch, 1 if a.chunk_size is None else a.chunk_size, a.repeats) < 1:
        raise UserError("--batch, --chunk-size and --repeats must be at least 1")
    settings = {"preset": a.preset, "batch": a.batch, "chunk_size": a.chunk_size, "repeats": a.repeats}
    found = in_process("dsclip.bench.captions", settings)
    rows = [
        f"{name:9} {found[name]['samples_per_second']:8.1f} samples/s {found[name]['tokens_per_caption']:6.1f} tokens a caption"
        for name in ("unsorted", "sorted")
    ]
    rows.append(f"sorted is {found['ratio']:.2f}x; captions need {found['needed_tokens']:.1f} tokens")
    return {**settings, **found, "environment": environment()}, "\n".join(rows)


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
