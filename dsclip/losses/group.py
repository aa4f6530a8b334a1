"""What a loss needs from the ranks. The losses take it as an argument and look up nothing themselves."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """The ranks of one global batch; `dsclip.distributed.Collectives` is the distributed one."""

    @property
    def rank(self) -> int:
        """This process, from 0."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def all_gather(self, x: Tensor) -> Tensor:
        """x [n, ...] of all ranks in rank order, [world_size·n, ...]."""

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over ranks."""


class SingleRank:
    """One process that holds the whole batch."""

    rank = 0
    world_size = 1

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return x


ALONE = SingleRank()
