"""What a loss needs from the ranks. The losses take it as an argument and look up nothing themselves."""

from __future__ import annotations

from collections.abc import Callable
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

    @property
    def in_ring(self) -> bool:
        """Whether features of other ranks come one rank at a time; otherwise all at once."""

    def all_gather(self, x: Tensor) -> Tensor:
        """x [n, ...] of all ranks in rank order, [world_size·n, ...]."""

    def pass_on(self, sent: list[Tensor], received: list[Tensor]) -> Callable[[], None]:
        """Starts to send to the next rank, and to receive the same shapes from the one before; what it returns waits."""

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over ranks."""


class SingleRank:
    """One process that holds the whole batch."""

    rank = 0
    world_size = 1
    in_ring = False

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def pass_on(self, sent: list[Tensor], received: list[Tensor]) -> Callable[[], None]:
        raise ValueError("one process has nobody to pass anything on to")

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return x


ALONE = SingleRank()
