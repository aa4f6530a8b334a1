"""What a checkpoint costs its training, beside a plain write of as many bytes to the same disk: `tools/bench_save.py`."""

from __future__ import annotations

import argparse
import ctypes
import errno
import math
import mmap
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsclip.bench.depth import cut
from dsclip.bench.step import make_batch, ours
from dsclip.checkpoint import CheckpointStore
from dsclip.command_line import parser, run_tool, say
from dsclip.config.schema import BatchSection
from dsclip.data import load_tokenizer
from dsclip.distributed import Collectives
from dsclip.errors import UserError
from dsclip.model import resolve_preset
from dsclip.saving import Background

EXAMPLE = "python tools/bench_save.py --preset ViT-B-32 --repeats 5 --folder /tmp/bench"
PIECE = 1 << 24
COPIED = 1 << 28  # bytes, more than a cache has
STEP_S = 0.05  # between two looks at what is being written, as steps of a training would be
# plain, direct: a plain write, through the system's cache and past it; blocking: a save at once; writing: in the background, until it
# is a checkpoint; stall: copying and looking; memory: a plain copy
MEASURED = ("plain", "direct", "blocking", "writing", "stall", "copying", "looking", "memory")


def main(argv: list[str] | None = None) -> None:
    """Parses, measures, prints, exits."""
    p = parser("Measures how long training waits for a checkpoint, written at once and in the background.", EXAMPLE)
    p.add_argument("--preset", default="ViT-B-32", help="model (default: ViT-B-32)")
    p.add_argument("--ds_config", "--ds-config", default="zero3_bf16", help="DeepSpeed JSON (default: zero3_bf16)")
    p.add_argument("--depth", type=float, default=1.0, help="share of both towers' layers (default: 1)")
    p.add_argument("--repeats", type=int, default=5, help="of which the medians are printed (default: 5)")
    p.add_argument("--folder", type=Path, required=True, help="where checkpoints are written; must not exist")
    sys.exit(run_tool(_measure, p.parse_args(argv)))


def _measure(a: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if a.folder.exists():
        raise UserError(f"{a.folder} exists already; choose another folder")
    if a.repeats < 1:
        raise UserError(f"--repeats is {a.repeats}; give at least one")
    config = cut(resolve_preset(a.preset), a.depth)
    engine = ours(config, BatchSection(2), a.ds_config)
    engine.train_step(make_batch(config, 2, 0))  # after which the optimizer has its moments
    group, tokenizer = Collectives.current(), load_tokenizer("demo")
    a.folder.mkdir(parents=True)
    background = Background(engine.bytes_to_save(), engine.device)
    stores = [
        CheckpointStore(a.folder / name, 1, tokenizer, background=b)
        for name, b in (("at once", None), ("copied", background))
    ]
    found: dict[str, list[float]] = {name: [] for name in MEASURED}
    size = 0
    try:
        for repeat in range(a.repeats + 1):  # the first one warms up: files, memory, imports
            say(f"save {repeat} of {a.repeats}")
            saved, blocking = _timed(lambda: stores[0].save(engine, {}, {}))
            size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
            _, copying = _timed(lambda: stores[1].copy(engine, {}, {}))
            writing, looking = _looked_until_finished(stores[1], group)
            plain, direct = (_plain(a.folder / "plain", size, flags) for flags in (0, getattr(os, "O_DIRECT", 0)))
            memory = _copied_in_memory(size)
            measured = (plain, direct, blocking, writing, copying + looking, copying, looking, memory)
            for values, value in zip(found.values(), measured, strict=True):
                values.append(value)
    finally:
        stores[1].close()
        shutil.rmtree(a.folder, ignore_errors=True)
        engine.close()
    first = {f"first_{name}_seconds": values[0] for name, values in found.items()}
    seconds = {name: statistics.median(values[1:]) for name, values in found.items()}
    pairs = {
        "stall_over_blocking": ("stall", "blocking"),
        "writing_speed_over_plain": ("plain", "writing"),
        "writing_speed_over_direct": ("direct", "writing"),
    }
    ratios = {
        name: statistics.median(x / y for x, y in zip(found[above][1:], found[below][1:], strict=True))
        for name, (above, below) in pairs.items()
    }
    result = {"gb": size / 1e9, **{f"{name}_seconds": s for name, s in seconds.items()}, **first, **ratios}
    rate = {name: size / 1e9 / s for name, s in seconds.items()}
    text = (
        f"{size / 1e9:.2f} GB, medians of {a.repeats}\n"
        f"a plain write, on the disk  {seconds['plain']:8.3f} s  {rate['plain']:6.2f} GB/s\n"
        f"the same past the cache     {seconds['direct']:8.3f} s  {rate['direct']:6.2f} GB/s\n"
        f"saved at once               {seconds['blocking']:8.3f} s  {rate['blocking']:6.2f} GB/s\n"
        f"written in the background   {seconds['writing']:8.3f} s  {rate['writing']:6.2f} GB/s, {ratios['writing_speed_over_plain']:.0%} and {ratios['writing_speed_over_direct']:.0%} of these writes' speed\n"
        f"training waits              {seconds['stall']:8.3f} s  {ratios['stall_over_blocking']:.1%} of a save at once: copying {seconds['copying']:.3f} s, "
        f"looking whether it is there {seconds['looking']:.3f} s\n"
        f"a plain copy in memory      {seconds['memory']:8.3f} s  {rate['memory']:6.2f} GB/s"
    )
    return result, text


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What work() returns, and its seconds; with nothing left for the disk from before."""
    os.sync()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def _looked_until_finished(store: CheckpointStore, group: Collectives) -> tuple[float, float]:
    """(seconds that the checkpoint under way was written and committed, those that the looks at it took). Raises NotSaved."""
    looking = 0.0
    while True:
        time.sleep(STEP_S)
        started = time.perf_counter()
        finished = store.finish(group, wait=False)
        looking += time.perf_counter() - started
        if finished is not None:
            return finished[1], looking


def _copied_in_memory(size: int) -> float:
    """Seconds for as many bytes between two places that both were touched before and no cache holds."""
    source, target = (torch.ones(COPIED, dtype=torch.uint8) for _ in range(2))
    started = time.perf_counter()
    for start in range(0, size, COPIED):
        ctypes.memmove(target.data_ptr(), source.data_ptr(), min(COPIED, size - start))
    return time.perf_counter() - started


def _plain(path: Path, size: int, flags: int = 0) -> float:
    """Seconds until so many random bytes are on the disk, which nobody hashes; infinite where the file system refuses the flags."""
    piece = mmap.mmap(-1, PIECE)
    piece.write(os.urandom(PIECE))
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE  # past the cache only pages are written

    def write() -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | flags)
        try:
            for start in range(0, whole, PIECE):
                os.write(handle, memoryview(piece)[: whole - start])
            os.fsync(handle)
        finally:
            os.close(handle)

    try:
        return _timed(write)[1]
    except OSError as error:
        if error.errno != errno.EINVAL or not flags:
            raise
        return math.inf
    finally:
        path.unlink(missing_ok=True)
