"""The command line of `tools/convert.py` and `tools/convert_hf.py`: any model that dsclip reads, in another format."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dsclip.checkpoint import Checkpoint
from dsclip.command_line import parser, run_tool, say
from dsclip.convert.compare import check_read_back, difference_in_openclip, difference_in_transformers
from dsclip.convert.dsclip_export import export_dsclip
from dsclip.convert.hf import DTYPES, MAX_SHARD_GB, export_hf, hf_class
from dsclip.convert.hub import check_repository, check_token, push_folder
from dsclip.convert.model_card import results_of_run
from dsclip.convert.openclip_export import export_openclip
from dsclip.convert.source import Source, open_source
from dsclip.convert.whole import whole_model
from dsclip.errors import UserError
from dsclip.model import ClipConfig

HF_EXAMPLE = "python tools/convert_hf.py runs/demo/checkpoints/step_00000400 OUT --dtype bf16"
EXAMPLE = "python tools/convert.py open_clip_folder OUT --to dsclip"
SIGLIP_PIPELINE_TOKENS = 64  # to which the zero-shot pipeline of transformers pads every SiglipModel's labels
PHASES = ("verified", "written", "compared")
# What a format is called, and the largest difference of float32 embeddings, whose entries are at most 1.
FORMATS = {"hf": ("a model of transformers", 1e-5), "openclip": ("an OpenCLIP model", 1e-6), "dsclip": ("a dsclip checkpoint", 1e-5)}  # fmt: skip


def main(argv: list[str] | None = None, *, to: str | None = None) -> None:
    """Parses, converts, compares, exits. to: the format to write, for a command without --to."""
    p = parser(
        "Converts a model to another format, and compares what was written with what it was made from."
        if to is None
        else "Converts a model to a folder that transformers loads: CLIPModel or SiglipModel, processor, pipeline.",
        EXAMPLE if to is None else HF_EXAMPLE,
    )
    p.add_argument(
        "model", metavar="MODEL", type=Path,
        help="checkpoint folder, run folder (its newest one), HuggingFace folder, OpenCLIP folder or state dict, hf:NAME, openclip:NAME",
    )  # fmt: skip
    p.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    if to is None:
        p.add_argument("--to", required=True, choices=list(FORMATS), help="format to write")
    p.add_argument("--ema", action="store_true", help="of a checkpoint: the moving average of its weights (optim.ema)")
    p.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the written weights (default: fp32)")
    p.add_argument("--tokenizer", help="folder or hub name (default: the model's own)")
    p.add_argument(
        "--max-shard-gb", type=float,
        help=f"hf: largest weight file, in 10⁹ bytes: one at a time is in memory (default: {MAX_SHARD_GB})",
    )  # fmt: skip
    p.add_argument(
        "--without-bias",
        action="store_true",
        help="hf: leave the bias of a sigmoid loss out, which CLIPModel has no place for",
    )
    p.add_argument(
        "--push", metavar="REPOSITORY",
        help="upload OUT to this repository of the HuggingFace hub, such as NAME/MODEL; one that isn't there is made, private",
    )  # fmt: skip
    p.set_defaults(**{} if to is None else {"to": to})
    sys.exit(run_tool(_convert, p.parse_args(argv)))


def _convert(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    a = arguments
    _check_options(a)
    laps = [time.perf_counter()]
    source = open_source(a.model, average=a.ema)
    with tempfile.TemporaryDirectory(prefix="dsclip-tokenizer-") as folder:
        model = whole_model(source, Path(folder), a.tokenizer)
        say(f"read {model.path}" + (f": step {model.step}, verified" if source.checkpoint else ""))
        for note in source.notes(model.config, of_the_bias=False):
            say(note)
        laps.append(time.perf_counter())
        more = _write(model, a)
        laps.append(time.perf_counter())
        difference, compared = _compare(model, source, a)
        laps.append(time.perf_counter())
    result = {
        "out": str(a.out), "to": a.to, "checkpoint": str(model.path), "dtype": a.dtype, "max_difference": difference,
        "seconds": {phase: stop - start for phase, start, stop in zip(PHASES, laps, laps[1:], strict=False)},
    }  # fmt: skip
    if a.push is not None:
        result["pushed"] = push_folder(a.out, a.push)
        compared += f"\npushed to {result['pushed']}"
    text = f"{a.out} is {FORMATS[a.to][0]}; {compared}\n\nNext:\n" + "\n".join(
        f"  {line}" for line in _next(a, model.config)
    )
    return result | more, text


def _check_options(a: argparse.Namespace) -> None:
    if a.push is not None:
        check_repository(a.push)
        check_token(a.push)
    if a.max_shard_gb is not None and not 0 < a.max_shard_gb < math.inf:
        raise UserError(f"--max-shard-gb is {a.max_shard_gb}; it must be a number more than 0")
    if a.to != "hf" and (a.max_shard_gb is not None or a.without_bias):
        option = "--without-bias" if a.without_bias else "--max-shard-gb"
        raise UserError(f"{option} belongs to --to hf; leave it out")
    if a.to == "dsclip" and a.dtype != "fp32":
        raise UserError(f"--dtype is {a.dtype}, and a dsclip checkpoint holds float32; leave it out")


def _write(model: Checkpoint, a: argparse.Namespace) -> dict[str, Any]:
    """Writes the folder; returns what the result says beside."""
    if a.to == "dsclip":
        export_dsclip(model, a.out)
        return {}
    if a.to == "openclip":
        export_openclip(model, a.out, dtype=a.dtype)
        return {}
    check_bias(model, left_out=a.without_bias)
    metrics, data = results_of_run(model)
    most = a.max_shard_gb or MAX_SHARD_GB
    export_hf(model, a.out, dtype=a.dtype, metrics=metrics, data=data, max_shard_gb=most)
    return {"results": {task: {"data": data.get(task), **values} for task, values in metrics.items()}}


def check_bias(model: Checkpoint, *, left_out: bool) -> None:
    """Raises UserError for a CLIPModel with a sigmoid loss's bias, unless it is to be left out."""
    if hf_class(model.config) == "SiglipModel":
        if left_out:
            raise UserError("--without-bias: a SiglipModel has a place for it; leave the option out")
        return
    if model.logit_bias is not None and not left_out:
        raise UserError(
            f"{model.path} has the bias {model.logit_bias:.4g} of a sigmoid loss, which CLIPModel has no place for, and "
            "SiglipModel has other towers (no class token, no causal mask). Zero-shot classes and retrieval don't depend on it, the probability of a single pair does. "
            "Leave it out with --without-bias, or keep it with tools/convert.py --to openclip"
        )


def _compare(model: Checkpoint, source: Source, a: argparse.Namespace) -> tuple[float | None, str]:
    """(largest difference of embeddings, if they were compared, a sentence on it). Raises UserError when it is too large."""
    (_, tolerance), difference, who = FORMATS[a.to], None, "transformers"
    if a.to == "hf":
        difference = difference_in_transformers(model, a.out)
    else:
        check_read_back(model, a.out, DTYPES[a.dtype])
        if a.to == "openclip":
            difference, who = difference_in_openclip(model, a.out), "OpenCLIP"
        elif source.format == "hf":
            difference = difference_in_transformers(model, source.path)
    if difference is not None and a.dtype == "fp32" and difference > tolerance:
        raise UserError(
            f"{a.out}: embeddings of dsclip and {who} differ by {difference:.1e}, more than {tolerance:.0e}; don't use it"
        )
    read_back = "" if a.to == "hf" else "it reads back bit for bit"
    if difference is not None:
        return (
            difference,
            f"{read_back}{', and ' * bool(read_back)}{who}' embeddings differ from dsclip's by {difference:.1e} at most",
        )
    return None, read_back + (
        ", and open_clip isn't installed here, so embeddings were not compared" if a.to == "openclip" else ""
    )


def _next(a: argparse.Namespace, config: ClipConfig) -> list[str]:
    """Commands that work with what was written."""
    evaluate = f"python launchers/evaluate.py --model {a.out} --task zeroshot --data SHARDS"
    if a.to == "hf" and config.text_pool == "last" and config.context_length != SIGLIP_PIPELINE_TOKENS:
        return [evaluate]
    if a.to == "hf":
        return [
            f"python -c \"from transformers import pipeline; print(pipeline('zero-shot-image-classification', '{a.out}'))\"",
            evaluate,
        ]
    if a.to == "openclip":
        return [f"python -c \"import open_clip; print(open_clip.create_model_and_transforms('local-dir:{a.out}')[2])\""]
    return [evaluate, f"deepspeed launchers/train.py --config RECIPE model.init={a.out}"]
