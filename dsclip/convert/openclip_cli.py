"""The command line of `tools/convert_openclip.py`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from dsclip.checkpoint import Checkpoint, read_checkpoint
from dsclip.command_line import parser, run_tool, say
from dsclip.convert.hf import DTYPES
from dsclip.convert.openclip_export import export_openclip
from dsclip.convert.probe import probe_inputs
from dsclip.convert.source import open_source
from dsclip.convert.streamed import loaded_clip
from dsclip.errors import UserError

EXAMPLE = "python tools/convert_openclip.py runs/demo/checkpoints/step_00000400 OUT"
TOLERANCE = 1e-6  # of float32 embeddings, whose entries are at most 1


def main(argv: list[str] | None = None) -> None:
    """Parses, converts, compares, exits."""
    p = parser("Converts a dsclip checkpoint to a folder that OpenCLIP loads as local-dir:OUT.", EXAMPLE)
    p.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint folder, or a run folder for its newest one"
    )
    p.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    p.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the written weights (default: fp32)")
    sys.exit(run_tool(_convert, p.parse_args(argv)))


def _convert(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    checkpoint = read_checkpoint(arguments.checkpoint)
    say(f"read {checkpoint.path}: step {checkpoint.step}, verified")
    export_openclip(checkpoint, arguments.out, dtype=arguments.dtype)
    check_read_back(checkpoint, arguments.out, DTYPES[arguments.dtype])
    difference = difference_in_openclip(checkpoint, arguments.out)
    if difference is not None and arguments.dtype == "fp32" and difference > TOLERANCE:
        raise UserError(
            f"{arguments.out}: OpenCLIP's embeddings differ by {difference:.1e}, more than {TOLERANCE:.0e}; don't use it"
        )
    result = {
        "out": str(arguments.out), "checkpoint": str(checkpoint.path), "dtype": arguments.dtype,
        "max_difference": difference,
    }  # fmt: skip
    compared = (
        "open_clip isn't installed here, so embeddings were not compared"
        if difference is None
        else f"its embeddings differ from dsclip's by {difference:.1e} at most"
    )
    text = (
        f"{arguments.out} is an OpenCLIP model; it reads back bit for bit, and {compared}\n\nNext:\n"
        f"  python -c \"import open_clip; print(open_clip.create_model_and_transforms('local-dir:{arguments.out}')[2])\""
    )
    return result, text


def check_read_back(checkpoint: Checkpoint, out: Path, dtype: torch.dtype) -> None:
    """Raises UserError when dsclip reads another configuration or another weight from the folder than was written."""
    source = open_source(out)
    said = {name: getattr(checkpoint.config, name) for name in source.said}
    if source.said != said:
        raise UserError(f"{out}: its configuration reads back as {source.said}, not {said}; don't use it")
    for name, tensor in source.weights():
        if not torch.equal(tensor, checkpoint.state_dict[name].to(dtype)):
            raise UserError(f"{out}: {name} reads back otherwise than it was written; don't use it")


@torch.no_grad()
def difference_in_openclip(checkpoint: Checkpoint, folder: Path, samples: int = 4) -> float | None:
    """Largest absolute difference between dsclip's float32 embeddings and those of the folder in OpenCLIP; None without it."""
    try:
        import open_clip
    except ImportError:
        return None
    c = checkpoint.config
    images, tokens = probe_inputs(c, c.eot_token_id, samples)  # OpenCLIP may pool at the largest id
    ours = loaded_clip(c, checkpoint.state_dict.items(), torch.device("cpu"), torch.float32)
    image, text = ours(images, tokens)
    del ours
    theirs = open_clip.create_model(f"local-dir:{folder}", precision="fp32").eval()
    differences = (
        image - theirs.encode_image(images, normalize=True),
        text - theirs.encode_text(tokens, normalize=True),
    )
    return max(float(d.abs().max()) for d in differences)
