"""A moving average of the weights (EMA), in float32 on the masters that this rank owns: nothing is gathered, whatever the ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import safe_open
from torch import Tensor

from dsclip.errors import UserError
from dsclip.optim.flat import FlatVector
from dsclip.saving import Files

PATTERN = "ema_rank_*.safetensors"


class AverageState(TypedDict):
    """What is saved of it as JSON: the steps it took in, and the averages of the loss's scalars by name."""

    updates: int
    scalars: dict[str, float]


class WeightAverage:
    """average ← d·average + (1 − d)·weights after each step, of the trained weights and the loss's scalars.

    d = min(decay, (1 + t)/(10 + t)) at the t-th update, TensorFlow's ramp: at first the average follows closely, so that
    little of the random start is left in it.
    """

    def __init__(self, vectors: list[FlatVector], scalars: Mapping[str, Tensor], decay: float):
        """vectors: from `flat_vectors`; scalars: those of the loss, which change in place."""
        self._vectors, self._scalars, self._decay = vectors, scalars, decay
        self.restart()

    def restart(self) -> None:
        """Begins again with the present weights."""
        self._updates = 0
        self._averages = [v.numbers.detach().clone() for v in self._vectors]
        self._of_scalars = {name: x.detach().clone() for name, x in self._scalars.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after an optimizer step."""
        self._updates += 1
        share = 1 - min(self._decay, (1 + self._updates) / (10 + self._updates))
        for average, vector in zip(self._averages, self._vectors, strict=True):
            average.lerp_(vector.numbers, share)
        for name, x in self._scalars.items():
            self._of_scalars[name].lerp_(x.detach(), share)

    @property
    def bytes(self) -> int:
        """Of this rank's part, in memory and as `save` writes it."""
        return sum(4 * x.numel() for x in self._averages)

    def pieces(self) -> dict[str, Tensor]:
        """This rank's part of each tensor, flat; none of tensors that lie on other ranks."""
        return {
            v.names[p.tensor]: average.narrow(0, p.offset, p.numel)
            for v, average in zip(self._vectors, self._averages, strict=True)
            for p in v.own
        }

    def save(self, files: Files, folder: Path, rank: int) -> AverageState:
        """Writes this rank's part; returns the rest."""
        path = folder / PATTERN.replace("*", f"{rank:05d}")
        shapes = {v.names[p.tensor]: list(v.shapes[p.tensor]) for v in self._vectors for p in v.own}
        pieces = {name: x.contiguous() for name, x in self.pieces().items()}
        files.tensors(pieces, path, {"shapes": json.dumps(shapes)})
        return {"updates": self._updates, "scalars": {name: x.item() for name, x in self._of_scalars.items()}}

    def resume(self, folder: Path, state: AverageState | None) -> None:
        """The same as `load`; a run that had no average begins one with its weights."""
        if state is None:
            self.restart()
        else:
            self.load(folder, state)

    def load(self, folder: Path, state: AverageState) -> None:
        """Restores what any number of ranks, in any ZeRO stage, saved of the same model."""
        self._updates = state["updates"]
        for name, value in state["scalars"].items():
            self._of_scalars[name].fill_(value)
        with ExitStack() as opened:
            parts = [opened.enter_context(safe_open(str(path), "pt")) for path in sorted(folder.glob(PATTERN))]
            for v, average in zip(self._vectors, self._averages, strict=True):
                for p in v.own:
                    average.narrow(0, p.offset, p.numel).copy_(_range(parts, v.names[p.tensor], p.start, p.numel))


class AverageOf(Mapping[str, Tensor]):
    """Weights by name with the average in the place of those that were trained, each read when it is asked for."""

    def __init__(self, folder: Path, weights: Mapping[str, Tensor]):
        """folder: a verified checkpoint's; weights: its own. Raises UserError where it has no average."""
        paths = sorted(folder.glob(PATTERN))
        if not paths:
            raise UserError(
                f"{folder} has no average of the weights: it was trained without optim.ema. Leave out --ema."
            )
        self._weights = weights
        self._parts: list[Any] = [safe_open(str(path), "pt") for path in paths]
        shapes = (json.loads(part.metadata()["shapes"]) for part in self._parts)
        self._shapes = {name: torch.Size(shape) for of_part in shapes for name, shape in of_part.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shapes:
            return self._weights[name]
        shape = self._shapes[name]
        return _range(self._parts, name, 0, shape.numel()).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _range(parts: list[Any], name: str, start: int, numel: int) -> Tensor:
    """Numbers of a flattened tensor, of which rank after rank has a stretch."""
    found, begin = [], 0
    for part in parts:
        if name not in part.keys():  # noqa: SIM118 (no mapping)
            continue
        piece = part.get_slice(name)
        (length,) = piece.get_shape()
        first, last = max(start, begin), min(start + numel, begin + length)
        if first < last:
            found.append(piece[first - begin : last - begin])
        begin += length
    return torch.cat(found)
