"""Muon: orthogonalised momentum for the blocks' matrices, AdamW for the rest (Jordan et al. 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsclip.config.schema import OptimSection
from dsclip.optim.flat import FlatVector, Piece
from dsclip.optim.optimizer import FlatOptimizer, Group, State, adam_moments

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic: steep at 0, so that five steps are enough
ITERATIONS = 5
RMS = 0.2  # of an update of AdamW, about (Liu et al. 2025, section 2.2)


class Muon(FlatOptimizer):
    """w ← w − lr·(0.2·√max(rows, columns)·O + decay·w), with O the orthogonalised Nesterov momentum.

    The factor (Liu et al. 2025, eq. 4) makes updates as long as AdamW's, so that both parts have one learning rate.
    """

    def __init__(self, groups: list[Group], optim: OptimSection):
        super().__init__(groups, optim)
        self._momentum = optim.muon_momentum
        self._exchanges: dict[int, Exchange] = {}

    def update(self, vector: FlatVector, grad: Tensor, state: State, group: Group) -> None:
        """Collective for matrices, each of which is put together on one rank alone."""
        numbers, lr = vector.numbers, group["lr"]
        if not group["orthogonal"]:
            first, second = adam_moments(numbers, grad, state, group)
            step = first.div_(second.sqrt_().add_(group["eps"]))
        else:
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(numbers)
            state["momentum"].lerp_(grad, 1 - self._momentum)
            if id(numbers) not in self._exchanges:
                self._exchanges[id(numbers)] = Exchange(vector)
            step = self._exchanges[id(numbers)].directions(grad.lerp(state["momentum"], self._momentum))
        numbers.mul_(1 - lr * group["weight_decay"]).sub_(step, alpha=lr)


class Exchange:
    """How the matrices of a vector come together, each on one rank, and go back; the same plan in every step."""

    def __init__(self, vector: FlatVector):
        ranks, here = range(vector.group.world_size), vector.group.rank
        owners = _owners(vector.shapes, len(ranks))

        def travelling(source: int, owner: int) -> list[Piece]:
            """What a rank holds of another's matrices, in the order of the tensors."""
            return sorted(p for p in vector.pieces[source] if owners[p.tensor] == owner)

        sent = [travelling(here, owner) for owner in ranks]
        received = [travelling(source, here) for source in ranks]
        self._vector = vector
        self._leaving = [p for pieces in sent for p in pieces]
        self._sizes = [[sum(p.numel for p in pieces) for pieces in side] for side in (sent, received)]
        self._lengths = [p.numel for pieces in received for p in pieces]
        parts = [(p.tensor, p.start, place) for place, p in enumerate(p for pieces in received for p in pieces)]
        # {matrix: its parts that arrive, in their order within the matrix}
        self._matrices = {
            t: [place for of, _, place in sorted(parts) if of == t] for t in sorted({t for t, *_ in parts})
        }

    def directions(self, momentum: Tensor) -> Tensor:
        """Each matrix of the vector orthogonalised and scaled; 0 in the padding. Collective: two all-to-alls."""
        group, (sent, received) = self._vector.group, self._sizes
        leaving = [momentum.narrow(0, p.offset, p.numel) for p in self._leaving]
        arrived = group.exchange(torch.cat(leaving) if leaving else momentum[:0], sent, received)
        parts = arrived.split(self._lengths)
        for tensor, places in self._matrices.items():
            whole = torch.cat([parts[place] for place in places]).view(self._vector.shapes[tensor])
            direction = _direction(whole, self._vector.names[tensor]).flatten()
            for place, part in zip(places, direction.split([self._lengths[p] for p in places]), strict=True):
                parts[place].copy_(part)
        back = group.exchange(arrived, received, sent)
        directions = torch.zeros_like(momentum)
        for p, values in zip(self._leaving, back.split([p.numel for p in self._leaving]), strict=True):
            directions.narrow(0, p.offset, p.numel).copy_(values)
        return directions


def _owners(shapes: list[torch.Size], ranks: int) -> list[int]:
    """The rank that orthogonalises each matrix: the largest first, each to the rank with the least work. The same on all."""
    work, owners = [0] * ranks, [0] * len(shapes)
    cost = [s.numel() * min(s) for s in shapes]
    for tensor in sorted(range(len(shapes)), key=lambda t: (-cost[t], t)):
        owners[tensor] = work.index(min(work))
        work[owners[tensor]] += cost[tensor]
    return owners


def _direction(matrix: Tensor, name: str) -> Tensor:
    """Query, key and value are matrices of their own in a `qkv.weight`."""
    stack = matrix.view(3, -1, matrix.shape[1]) if name.endswith("qkv.weight") else matrix.unsqueeze(0)
    return (RMS * math.sqrt(max(stack.shape[1:])) * orthogonalised(stack)).view_as(matrix)


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U·Vᵀ of each of the matrices [k, rows, columns] = U·S·Vᵀ: singular values between 0.7 and 1.2.

    Newton-Schulz iterations, in bf16 on a GPU, as published, and in float32 on a CPU.
    """
    a, b, c = COEFFICIENTS
    x: Tensor = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
