"""dsclip checkpoints, written from weights of others: what `model.init`, `evaluate.py` and conversion read."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import torch

from dsclip.checkpoint import Checkpoint
from dsclip.checkpoint.manifest import LaterRunState, write_manifest
from dsclip.checkpoint.weights_alone import WEIGHTS
from dsclip.convert.finite import finite
from dsclip.convert.folder import whole_folder
from dsclip.convert.made_ahead import made_ahead
from dsclip.convert.safetensors_file import write_one_file
from dsclip.convert.streamed import empty_clip
from dsclip.convert.tokenizer_folder import write_tokenizer
from dsclip.convert.weights import fitting


def export_dsclip(model: Checkpoint, out: Path) -> None:
    """Writes the model as a checkpoint of weights alone: float32 safetensors, tokenizer, manifest.

    One tensor at a time is in memory. Written aside and renamed, so `out` is whole or absent. Raises UserError when `out`
    exists with content, and for weights that are not finite.
    """
    with whole_folder(Path(out)) as temporary:
        write_tokenizer(model.tokenizer_dir, temporary / "tokenizer", model.config.context_length)
        empty = empty_clip(model.config).state_dict()
        shapes = ((name, x.shape, torch.float32) for name, x in empty.items())
        weights = fitting(empty, finite(model.state_dict.items(), model.path))
        write_one_file(temporary / WEIGHTS, shapes, made_ahead((name, x.float()) for name, x in weights))
        scalars = {"log_scale": {"value": math.log(model.logit_scale)}}
        if model.logit_bias is not None:
            scalars["bias"] = {"value": model.logit_bias}
        state: LaterRunState = {
            "step": model.step, "samples": model.samples, "world_size": 1, "zero_stage": 0, "model": asdict(model.config),
            "recipe": model.recipe, "engine": {"step": model.step, "scalars": scalars, "queue": None}, "data": [],
        }  # fmt: skip
        write_manifest(temporary, state)
