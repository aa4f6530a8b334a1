"""The command line of `tools/convert_hf.py`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import get_max_memory

from dsclip.checkpoint import Checkpoint, read_checkpoint
from dsclip.command_line import parser, run_tool, say
from dsclip.convert.hf import DTYPES, MAX_SHARD_GB, export_hf
from dsclip.convert.model_card import results_of_run
from dsclip.convert.probe import probe_inputs
from dsclip.convert.streamed import spread_clip
from dsclip.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPModel

EXAMPLE = "python tools/convert_hf.py runs/demo/checkpoints/step_00000400 OUT --dtype bf16"
TOLERANCE = 1e-5  # of float32 embeddings, whose entries are at most 1


def main(argv: list[str] | None = None) -> None:
    """Parses, converts, compares, exits."""
    p = parser(
        "Converts a dsclip checkpoint to a folder that transformers loads: CLIPModel, CLIPProcessor, pipeline.", EXAMPLE
    )
    p.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint folder, or a run folder for its newest one"
    )
    p.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    p.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the written weights (default: fp32)")
    p.add_argument(
        "--max-shard-gb", type=float, default=MAX_SHARD_GB,
        help="largest weight file, in 10⁹ bytes: one at a time is in memory (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--without-bias",
        action="store_true",
        help="leave the bias of a sigmoid loss out, which CLIPModel has no place for",
    )
    sys.exit(run_tool(_convert, p.parse_args(argv)))


def _convert(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if arguments.max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb is {arguments.max_shard_gb}; it must be more than 0")
    checkpoint = read_checkpoint(arguments.checkpoint)
    say(f"read {checkpoint.path}: step {checkpoint.step}, verified")
    check_bias(checkpoint, left_out=arguments.without_bias)
    metrics, data = results_of_run(checkpoint)
    options = dict(metrics=metrics, data=data, max_shard_gb=arguments.max_shard_gb)
    export_hf(checkpoint, arguments.out, dtype=arguments.dtype, **options)
    difference = largest_difference(checkpoint, arguments.out)
    if arguments.dtype == "fp32" and difference > TOLERANCE:
        raise UserError(
            f"{arguments.out}: transformers' embeddings differ by {difference:.1e}, more than {TOLERANCE:.0e}; don't use it"
        )
    result = {
        "out": str(arguments.out),
        "checkpoint": str(checkpoint.path),
        "dtype": arguments.dtype,
        "results": {task: {"data": data.get(task), **values} for task, values in metrics.items()},
        "max_difference": difference,
    }
    text = (
        f"{arguments.out} is a CLIPModel; its embeddings differ from dsclip's by {difference:.1e} at most\n\nNext:\n"
        f"  python -c \"from transformers import pipeline; print(pipeline('zero-shot-image-classification', '{arguments.out}'))\"\n"
        f"  python launchers/evaluate.py --model {arguments.out} --task zeroshot --data SHARDS"
    )
    return result, text


def check_bias(checkpoint: Checkpoint, *, left_out: bool) -> None:
    """Raises UserError for a model with a sigmoid loss's bias, unless it is to be left out."""
    if checkpoint.logit_bias is not None and not left_out:
        raise UserError(
            f"{checkpoint.path} has the bias {checkpoint.logit_bias:.4g} of a sigmoid loss, which CLIPModel has no place for, and "
            "SiglipModel is another architecture. Zero-shot classes and retrieval don't depend on it, the probability of a single pair does. "
            "Leave it out with --without-bias, or keep it with tools/convert_openclip.py"
        )


@torch.no_grad()
def largest_difference(checkpoint: Checkpoint, folder: Path, samples: int = 4) -> float:
    """Largest absolute difference between dsclip's float32 embeddings and those of the folder in `transformers`.

    One of the two models is in memory at a time, and only what fits of it.
    """
    c = checkpoint.config
    images, tokens = probe_inputs(c, c.vocab_size, samples)
    with tempfile.TemporaryDirectory(prefix="dsclip-offload-") as offload:
        ours, _ = spread_clip(c, checkpoint.state_dict.items(), torch.float32, Path(offload) / "ours", gpus=False)
        image, text = ours(images, tokens)
        del ours
        theirs = _in_transformers(folder, Path(offload) / "theirs")
        output = theirs(input_ids=tokens, pixel_values=images)
    return float(max((image - output.image_embeds).abs().max(), (text - output.text_embeds).abs().max()))


def _in_transformers(folder: Path, offload: Path) -> CLIPModel:
    from transformers import CLIPModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    memory = {"cpu": get_max_memory()["cpu"]}
    return CLIPModel.from_pretrained(
        folder, dtype=torch.float32, device_map="auto", max_memory=memory, offload_folder=str(offload)
    ).eval()
