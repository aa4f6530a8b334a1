"""Reads a checkpoint as one full-precision model, in one process, for evaluation and conversion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dsclip.checkpoint.load import find_checkpoint
from dsclip.checkpoint.manifest import MANIFEST, verify
from dsclip.checkpoint.weights_alone import WEIGHTS, mapped_weights
from dsclip.config.schema import ModelSection
from dsclip.errors import UserError
from dsclip.model import ClipConfig
from dsclip.model.heads import WithoutHeads
from dsclip.model.low_rank import MergedWeights
from dsclip.optim.average import AverageOf


@dataclass(frozen=True)
class Checkpoint:
    """A trained model, whole. logit_scale: the factor on similarities; logit_bias: that of a sigmoid loss.

    state_dict: float32 weights by dsclip's names, each read from the disk when it is asked for; adapters are merged into them.
    average: they are the moving average of the run's. heads: of the run's objective, whose weights are left out.
    """

    path: Path
    config: ClipConfig
    state_dict: Mapping[str, Tensor]
    logit_scale: float
    tokenizer_dir: Path
    step: int
    samples: int
    recipe: dict[str, dict[str, Any]]
    logit_bias: float | None = None
    average: bool = False
    heads: tuple[str, ...] = ()


def read_checkpoint(path: str | Path, *, average: bool = False) -> Checkpoint:
    """The checkpoint at `path`, or the newest of the run folder `path`, from ZeRO-1, 2 or 3 with any number of ranks.

    average: the moving average of its weights (`optim.ema`) in their place. Raises UserError when it isn't a checkpoint, is
    damaged, or has no average.
    """
    from dsclip.engine.consolidate import full_precision_weights

    folder = find_checkpoint(Path(path))
    manifest = verify(folder)
    try:
        # The machine that reads them computes as it suits it.
        config = replace(ClipConfig(**manifest["model"]), attention="auto", fp8=False)
        scalars = manifest["engine"]["scalars"]
        logit_scale = math.exp(scalars["log_scale"]["value"])
        logit_bias = scalars["bias"]["value"] if "bias" in scalars else None
        if average and (state := manifest["engine"].get("average")):
            logit_scale = math.exp(state["scalars"]["log_scale"])
            logit_bias = state["scalars"].get("bias")
        model = manifest["recipe"].get("model", {})
        # An earlier version wrote neither.
        lora_scale = ModelSection(**{n: model[n] for n in ("lora_rank", "lora_alpha") if n in model}).lora_scale
    except (TypeError, KeyError) as error:
        raise UserError(f"{folder}/{MANIFEST} is damaged ({error}); use another checkpoint of the run") from error
    weights = mapped_weights(folder) if WEIGHTS in manifest["files"] else full_precision_weights(folder)
    towers = WithoutHeads(weights)
    return Checkpoint(
        path=folder,
        config=config,
        state_dict=MergedWeights(AverageOf(folder, towers) if average else towers, lora_scale),
        logit_scale=logit_scale,
        tokenizer_dir=folder / "tokenizer",
        step=manifest["step"],
        samples=manifest["samples"],
        recipe=manifest["recipe"],
        logit_bias=logit_bias,
        average=average,
        heads=towers.heads,
    )
