"""The flat vectors that ZeRO gives an optimizer, and where the model's tensors lie in them.

Under ZeRO an optimizer steps on a few vectors of float32 numbers. A vector holds this rank's part of many tensors: under ZeRO-1
and 2 a slice of all tensors of a group laid end to end, under ZeRO-3 a slice of each tensor. What works number by number needs to
know nothing of that. A norm of a tensor does: it is the sum over the ranks that hold a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsclip.config.schema import OptimSection
from dsclip.distributed import Collectives
from dsclip.model import Clip
from dsclip.optim.groups import grouped_names


class Piece(NamedTuple):
    """Numbers start … start + numel of a flattened tensor, from `offset` on in a rank's vector. tensor: its number."""

    tensor: int
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class FlatVector:
    """One vector of masters of this rank, and the tensors that it is a part of, which all ranks number alike.

    pieces: of every rank, in the order of their offsets. Numbers of a vector that are in none are padding.
    """

    numbers: Tensor
    names: list[str]
    shapes: list[torch.Size]
    pieces: list[list[Piece]]
    group: Collectives

    @property
    def own(self) -> list[Piece]:
        """Of this rank."""
        return self.pieces[self.group.rank]

    def squares(self, *values: Tensor) -> list[Tensor]:
        """Sums of squares over each whole tensor: float64 [tensors] for each of the vectors `values`. One all-reduce."""
        sums = torch.zeros(len(values), len(self.names), dtype=torch.float64, device=self.numbers.device)
        if self.own:
            for row, value in zip(sums, values, strict=True):
                norms = torch._foreach_norm([value.narrow(0, p.offset, p.numel) for p in self.own])
                row[self._held] = torch.stack(norms).double().square()
        return list(self.group.all_reduce_sum(sums))

    def spread(self, factors: Tensor) -> Tensor:
        """A factor for each number of the vector, float32, from one for each tensor; 1 in the padding."""
        tensors, lengths = self._segments
        padded = torch.cat([factors.float(), factors.new_ones(1, dtype=torch.float32)])
        return padded[tensors].repeat_interleave(lengths, output_size=self.numbers.numel())

    @cached_property
    def sizes(self) -> Tensor:
        """Numbers of each whole tensor, float64 [tensors]."""
        return torch.tensor([s.numel() for s in self.shapes], dtype=torch.float64, device=self.numbers.device)

    @cached_property
    def _held(self) -> Tensor:
        """The tensors of this rank's pieces. Kept, since a copy to the device would wait for it in every step."""
        return torch.tensor([p.tensor for p in self.own], device=self.numbers.device)

    @cached_property
    def _segments(self) -> tuple[Tensor, Tensor]:
        """The tensor of each stretch of the vector, −1 for padding, and the stretch's length."""
        found, end = [], 0
        for p in self.own:
            found += [(-1, p.offset - end), (p.tensor, p.numel)]
            end = p.offset + p.numel
        found.append((-1, self.numbers.numel() - end))
        tensors, lengths = zip(*found, strict=True)
        device = self.numbers.device
        return torch.tensor(tensors, device=device), torch.tensor(lengths, device=device)


def flat_vectors(zero: Any, model: Clip, optim: OptimSection) -> list[FlatVector]:
    """All vectors of DeepSpeed's ZeRO optimizer, of any stage, in the order of the parameter groups. Collective."""
    group = Collectives.current()
    parameters = dict(model.named_parameters())
    vectors = []
    for number, names in enumerate(grouped_names(model, optim).values()):
        held = [(name, parameters[name]) for name in names]
        for numbers, tensors in _vectors_of(zero, number, held):
            own = [piece for i, (_, p) in enumerate(tensors) if (piece := _piece(zero, i, p)) is not None]
            own.sort(key=lambda piece: piece.offset)
            shapes = [torch.Size(getattr(p, "ds_shape", p.shape)) for _, p in tensors]
            pieces = group.all_gather_object(own)
            vectors.append(FlatVector(numbers, [name for name, _ in tensors], shapes, pieces, group))
    return vectors


Named = list[tuple[str, nn.Parameter]]


def _vectors_of(zero: Any, number: int, held: Named) -> Iterator[tuple[Tensor, Named]]:
    """The vectors of a parameter group, each with its tensors; ZeRO-3 cuts a large group into several (sub_group_size)."""
    if not hasattr(zero, "grad_position"):
        yield zero.optimizer.param_groups[number]["params"][0], held
        return
    for index in sorted({zero.grad_position[zero.get_param_id(p)][0] for _, p in held}):
        together = [(n, p) for n, p in held if zero.grad_position[zero.get_param_id(p)][0] == index]
        yield zero.fp32_partitioned_groups_flat[index], together


def _piece(zero: Any, tensor: int, parameter: Any) -> Piece | None:
    """What this rank holds of a parameter; None where that is nothing."""
    if hasattr(parameter, "ds_tensor"):
        _, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        start = Collectives.current().rank * padded
        numel = min(padded, parameter.ds_numel - start)
        return Piece(tensor, start, numel, offset) if numel > 0 else None
    if (mapping := parameter._hp_mapping) is None:
        return None
    inside, in_vector = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Piece(tensor, inside.start, inside.numel, in_vector.start)
