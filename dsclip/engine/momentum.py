"""A moving average of the weights that embeds the queue's pairs (MoCo), sharded like the model itself."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dsclip.engine.build import build_model
from dsclip.engine.quiet_deepspeed import deepspeed
from dsclip.engine.state import Sharding
from dsclip.model import Clip, ClipConfig, Layer
from dsclip.saving import Files


class MomentumEncoder:
    """average ← m·average + (1 − m)·weights after each step, in float32, on this rank's shards."""

    def __init__(
        self, model: Clip, config: ClipConfig, ds_config: dict[str, Any], momentum: float, device: torch.device
    ):
        self._weights, self._momentum, self._buffers = list(model.parameters()), momentum, list(model.buffers())
        sharded = ds_config["zero_optimization"]["stage"] == 3
        if sharded:
            settings = copy.deepcopy(ds_config)
            # Persisted parameters are gathered once only; these change after every step.
            settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
            settings["zero_optimization"].pop("offload_optimizer", None)
            averaged = build_model(config, settings, seed=0)
            deepspeed.utils.set_z3_leaf_modules(averaged, [Layer])
            self._model, *_ = deepspeed.initialize(model=averaged, config=settings, dist_init_required=False)
        else:
            averaged = build_model(config, ds_config, seed=0).to(device, self._weights[0].dtype)
            self._model = averaged
        self._parameters = list(averaged.parameters())  # the average, in the weights' dtype
        self._average = [_shard(p).detach().float().clone() for p in self._weights]
        self._publish()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The features of the averaged model; arguments as `Clip.forward`. Collective under ZeRO-3."""
        image, text = self._model(*args, **kwargs)
        return image, text

    def replicated(self) -> dict[str, Tensor]:
        """The average by name where every rank holds it whole: under ZeRO-1 and 2."""
        named = zip(self._model.named_parameters(), self._average, strict=True)
        return {f"average of {name}": x for (name, p), x in named if not hasattr(p, "ds_tensor")}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after an optimizer step."""
        for average, weight in zip(self._average, self._weights, strict=True):
            average.lerp_(_shard(weight).to(average.device, torch.float32), 1 - self._momentum)
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for parameter, average in zip(self._parameters, self._average, strict=True):
            _shard(parameter).copy_(average)
        for ours, theirs in zip(self._model.buffers(), self._buffers, strict=True):  # integers, which have no average
            ours.copy_(theirs)

    def _load_resharded(self, folder: Path, rank: int, shards: int) -> None:
        """shards: files that hold a tensor together. One tensor at a time is whole in memory."""
        with ExitStack() as opened:
            files = [opened.enter_context(safe_open(str(folder / _file(r)), "pt")) for r in range(shards)]
            for index, (average, weight) in enumerate(zip(self._average, self._weights, strict=True)):
                numel = getattr(weight, "ds_numel", weight.numel())
                whole = torch.cat([file.get_tensor(str(index)).flatten() for file in files])[:numel]
                start = rank * average.numel() if hasattr(weight, "ds_tensor") else 0
                mine = whole[start : start + average.numel()]
                average.zero_().view(-1)[: len(mine)].copy_(mine)  # what is left of a last shard is padding

    @property
    def bytes(self) -> int:
        """Of this rank's shards of the average, as `save` writes them."""
        return sum(4 * x.numel() for x in self._average)

    def save(self, files: Files, folder: Path, rank: int) -> None:
        """Writes this rank's shards of the average."""
        files.tensors({str(i): x for i, x in enumerate(self._average)}, folder / _file(rank))

    def load(self, folder: Path, rank: int, written_by: Sharding | None = None) -> None:
        """Restores what `save` wrote on the same rank. A run that had no momentum encoder starts from its weights.

        written_by: where the ranks or the ZeRO stage were other ones.
        """
        path = folder / _file(rank if written_by is None else 0)
        if path.is_file() and written_by is not None:
            self._load_resharded(folder, rank, written_by.ranks if written_by.stage == 3 else 1)
        elif path.is_file():
            stored = load_file(str(path))
            for index, average in enumerate(self._average):
                average.copy_(stored[str(index)])
        else:
            for average, weight in zip(self._average, self._weights, strict=True):
                average.copy_(_shard(weight))
        self._publish()


def _shard(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: its ZeRO-3 partition, or all of it."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


def _file(rank: int) -> str:
    return f"momentum_rank_{rank:05d}.safetensors"
