"""Resume on another number of ranks or in another ZeRO stage: each number of the optimizer goes to where it lies now.

Beside DeepSpeed's file a rank writes which numbers of which tensors its flat vectors held. On loading, a rank looks up who had the
numbers that it needs, and maps those files alone. Nothing is converted, and no padding is guessed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsclip.engine.consolidate import DEEPSPEED_TAG, full_precision_weights, load_mapped
from dsclip.engine.quiet_deepspeed import deepspeed
from dsclip.engine.state import LAYOUTS
from dsclip.errors import UserError
from dsclip.optim.flat import FlatVector, Piece
from dsclip.saving import Files

MASTER = "master"


class _Stretch(NamedTuple):
    """Numbers start … start + numel of a flattened tensor, from `offset` on in a vector of a saved rank."""

    start: int
    numel: int
    rank: int
    vector: int
    offset: int


def save_layout(files: Files, folder: Path, vectors: list[FlatVector], rank: int) -> None:
    """Writes what this rank's vectors hold: for each, [tensor, start, numel, offset] of its pieces."""
    held = [[(v.names[p.tensor], p.start, p.numel, p.offset) for p in v.own] for v in vectors]
    files.text(json.dumps(held), folder / LAYOUTS.replace("*", f"{rank:05d}"))


class SavedOptimizer:
    """Masters and state of an optimizer in a verified checkpoint, by tensor, whatever ranks and stage wrote them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._held: dict[str, list[_Stretch]] = defaultdict(list)
        for rank, path in enumerate(sorted(folder.glob(LAYOUTS))):
            for vector, pieces in enumerate(json.loads(path.read_text())):
                for name, start, numel, offset in pieces:
                    self._held[name].append(_Stretch(start, numel, rank, vector, offset))
        self._of_rank = cache(self._read)

    def state_of(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps of the vector that holds a tensor: numbers for each of its own, or one for all (`step`)."""
        if name not in self._held:
            raise UserError(f"{self._folder} has no optimizer state of {name}; start a new run with model.init")
        first = self._held[name][0]
        return self._of_rank(first.rank)[first.vector]

    def fill(self, vector: Tensor, name: str, piece: Piece, key: str) -> None:
        """Writes a piece of a tensor's masters or state into a vector of this rank."""
        filled = 0
        for held in self._held[name]:
            begin, end = max(held.start, piece.start), min(held.start + held.numel, piece.start + piece.numel)
            if begin < end:
                source = self._of_rank(held.rank)[held.vector][key].narrow(
                    0, held.offset + begin - held.start, end - begin
                )
                vector.narrow(0, piece.offset + begin - piece.start, end - begin).copy_(source)
                filled += end - begin
        if filled != piece.numel:
            raise UserError(
                f"{self._folder} has {filled} of {piece.numel} numbers of {name} ({key}); use another checkpoint of the run"
            )

    def _read(self, rank: int) -> list[dict[str, Any]]:
        (path,) = (self._folder / DEEPSPEED_TAG).glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        content = load_mapped(path)["optimizer_state_dict"]
        if "fp32_flat_groups" in content:  # ZeRO-3
            masters, optimizer = content["fp32_flat_groups"], content["optimizer_state_dict"]
        else:
            masters, optimizer = content["single_partition_of_fp32_groups"], content["base_optimizer_state"]
        return [{**optimizer["state"].get(index, {}), MASTER: numbers} for index, numbers in enumerate(masters)]


@torch.no_grad()
def load_resharded(zero: Any, model: nn.Module, vectors: list[FlatVector], folder: Path) -> None:
    """Restores masters, optimizer and weights, also frozen ones. Collective. zero: DeepSpeed's optimizer, fresh."""
    saved, states = SavedOptimizer(folder), {}
    for index, vector in enumerate(vectors):
        for piece in vector.own:
            saved.fill(vector.numbers, vector.names[piece.tensor], piece, MASTER)
        state = saved.state_of(vector.names[0])
        states[index] = {key: _placed(saved, vector, key, x) for key, x in state.items() if key != MASTER}
    states = {index: state for index, state in states.items() if state}
    if hasattr(zero, "grad_position"):  # ZeRO-3
        zero.checkpoint_event_prologue()
        content = zero.state_dict()
        content["optimizer_state_dict"]["state"] = states
        zero.load_state_dict([content] * vectors[0].group.world_size)  # the weights follow from the masters
        _load_frozen(model, folder)
        zero.checkpoint_event_epilogue()
    else:
        groups = zero.optimizer.state_dict()["param_groups"]
        zero.optimizer.load_state_dict({"state": states, "param_groups": groups})
        zero.update_lp_params()
        _load_frozen(model, folder)


def _placed(saved: SavedOptimizer, vector: FlatVector, key: str, like: Any) -> Any:
    if not isinstance(like, Tensor):
        return like
    if like.dim() == 0:
        return like.clone()
    numbers = torch.zeros_like(vector.numbers, dtype=like.dtype)
    for piece in vector.own:
        saved.fill(numbers, vector.names[piece.tensor], piece, key)
    return numbers


def _load_frozen(model: nn.Module, folder: Path) -> None:
    """What no optimizer has: frozen weights, and buffers."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    buffers = dict(model.named_buffers())
    weights = full_precision_weights(folder) if frozen or buffers else {}
    for name, buffer in buffers.items():
        buffer.copy_(weights[name])
    for name, parameter in frozen.items():
        if not hasattr(parameter, "ds_tensor"):
            parameter.copy_(weights[name])
            continue
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                parameter.copy_(weights[name])
