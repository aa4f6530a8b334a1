"""What converting a sharded checkpoint takes, against reading its bytes: `tools/bench_convert.py`.

The checkpoint has the files that DeepSpeed 0.19.8 writes for ZeRO-3, made without the ranks that a training would need.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsclip.bench.depth import cut
from dsclip.checkpoint.manifest import LaterRunState, write_manifest
from dsclip.command_line import parser, run_tool, say
from dsclip.config.schema import OptimSection
from dsclip.data import load_tokenizer
from dsclip.engine.consolidate import DEEPSPEED_TAG
from dsclip.errors import RunFailed, UserError
from dsclip.files import on_disk
from dsclip.model import Clip, ClipConfig, resolve_preset
from dsclip.optim.groups import grouped_names

EXAMPLE = "python tools/bench_convert.py --preset ViT-bigG-14 --ranks 4 --depth 0.5 --folder /tmp/bench"
SAMPLE_S = 0.02


def main(argv: list[str] | None = None) -> None:
    """Parses, measures, prints, exits."""
    p = parser(
        "Measures memory and time of converting a ZeRO-3 checkpoint of random weights to a HuggingFace folder.", EXAMPLE
    )
    p.add_argument("--preset", default="ViT-B-32", help="model (default: ViT-B-32)")
    p.add_argument("--ranks", type=int, default=4, help="that the checkpoint is from (default: 4)")
    p.add_argument("--depth", type=float, default=1.0, help="share of both towers' layers (default: 1)")
    p.add_argument("--max-shard-gb", type=float, default=1.0, help="of the written files (default: 1)")
    p.add_argument(
        "--folder", type=Path, required=True, help="where the checkpoint and the result are written; must not exist"
    )
    sys.exit(run_tool(_measure, p.parse_args(argv)))


def _measure(a: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if a.folder.exists():
        raise UserError(f"{a.folder} exists already; choose another folder")
    if a.ranks < 1:
        raise UserError(f"--ranks is {a.ranks}; give at least one rank")
    tokenizer = load_tokenizer("demo")
    config = replace(cut(resolve_preset(a.preset), a.depth), eot_token_id=tokenizer.eot_token_id)
    say(f"writing a checkpoint of {a.ranks} ranks")
    checkpoint = a.folder / "step_00000001"
    numbers = write_zero3(checkpoint, config, a.ranks)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    forget(files)
    reading = _seconds_to_read(files)
    forget(files)
    say("converting")
    used = _watched([sys.executable, "tools/convert_hf.py", str(checkpoint), str(a.folder / "hf"), "--max-shard-gb", str(a.max_shard_gb), "--json"])  # fmt: skip
    weights, phases = 4 * numbers, used.result["seconds"]
    converting = phases["verified"] + phases["written"]
    result = {
        "parameters": numbers, "weights_gb": weights / 1e9, "checkpoint_gb": sum(f.stat().st_size for f in files) / 1e9,
        "reading_seconds": reading, "seconds": used.seconds, "phases": phases, "converting_over_reading": converting / reading,
        "peak_gb": used.peak_gb, "peak_over_weights": used.peak_gb * 1e9 / weights, "peak_with_mapped_gb": used.mapped_gb,
        "max_difference": used.result["max_difference"],
    }  # fmt: skip
    text = (
        f"{numbers / 1e6:.0f} M parameters, {result['weights_gb']:.2f} GB in float32, {result['checkpoint_gb']:.2f} GB of checkpoint\n"
        f"reading its bytes     {reading:8.1f} s\nverified and written  {converting:8.1f} s, {result['converting_over_reading']:.2f} times\n"
        f"compared              {phases['compared']:8.1f} s, with imports {used.seconds:.1f} s in all\n"
        f"memory at most        {used.peak_gb:8.2f} GB, {result['peak_over_weights']:.2f} times the weights; "
        f"with mapped files {used.mapped_gb:.2f} GB"
    )
    return result, text


def write_zero3(folder: Path, config: ClipConfig, ranks: int) -> int:
    """A checkpoint of random weights, in the files of so many ranks; returns the number of weights.

    Every rank has a part of each parameter, padded to equal parts, one after the other in two flat vectors, of parameters with
    and without decay, each with AdamW's two moments.
    """
    with torch.device("meta"):
        model = Clip(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    groups = [
        OrderedDict((name, shapes[name]) for name in names) for names in grouped_names(model, OptimSection()).values()
    ]
    files = folder / DEEPSPEED_TAG
    files.mkdir(parents=True)
    for rank in range(ranks):
        flat = [torch.cat([_part(shape, rank, ranks) for shape in group.values()]) for group in groups]
        moments = {
            i: {"step": torch.tensor(1.0), "exp_avg": x.clone(), "exp_avg_sq": x.clone()} for i, x in enumerate(flat)
        }
        states = {
            "zero_stage": 3, "partition_count": ranks, "loss_scaler": None, "dynamic_loss_scale": False, "overflow": False,
            "fp32_flat_groups": flat, "optimizer_state_dict": {"state": moments, "param_groups": []},
        }  # fmt: skip
        shared = {"ds_config": {}, "ds_version": "0.19.8"}
        torch.save(
            {"optimizer_state_dict": states, **shared}, files / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
        described = {
            "module": OrderedDict((name, torch.empty(0, dtype=torch.bfloat16)) for name in shapes), "buffer_names": [],
            "param_shapes": groups, "frozen_param_shapes": OrderedDict(), "shared_params": {}, "frozen_param_fragments": OrderedDict(),
        }  # fmt: skip
        torch.save(described | shared, files / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    load_tokenizer("demo").save(folder / "tokenizer")
    state: LaterRunState = {
        "step": 1, "samples": 1, "world_size": ranks, "zero_stage": 3, "model": asdict(config), "recipe": {},
        "engine": {"step": 1, "scalars": {"log_scale": {"value": math.log(100)}}, "queue": None}, "data": [{}] * ranks,
    }  # fmt: skip
    write_manifest(folder, state)
    return model.parameter_count()


def _part(shape: torch.Size, rank: int, ranks: int) -> Tensor:
    """A rank's part of a parameter, drawn by the rank; norms about 1 keep features of a deep model apart."""
    drawn = torch.empty(-(-shape.numel() // ranks)).normal_(generator=torch.Generator().manual_seed(rank))
    return 1 + 0.02 * drawn if len(shape) == 1 else 0.02 * drawn


def forget(files: list[Path]) -> None:
    """Has the machine read these files from the disk when they are read next."""
    for path in files:
        on_disk(path)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _seconds_to_read(files: list[Path]) -> float:
    start = time.perf_counter()
    buffer = bytearray(1 << 22)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


@dataclass(frozen=True)
class Used:
    """Of a process: seconds; the most memory in 10⁹ bytes that isn't a mapped file, and with those; what it printed."""

    seconds: float
    peak_gb: float
    mapped_gb: float
    result: dict[str, Any]


def _watched(command: list[str]) -> Used:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = {"RssAnon": 0, "VmHWM": 0}
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]))
        time.sleep(SAMPLE_S)
    seconds = time.perf_counter() - start
    output = process.communicate()[0]
    if process.returncode:
        raise RunFailed(f"the conversion failed with exit code {process.returncode}")
    return Used(seconds, peaks["RssAnon"] * 1024 / 1e9, peaks["VmHWM"] * 1024 / 1e9, json.loads(output))
