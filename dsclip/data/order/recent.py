"""A method's last results, in workers too."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """A method's last results, by its arguments: an lru_cache that can be pickled, since loader workers may be spawned."""

    def __init__(self, method: Callable[..., T], most: int):
        self._method, self._most = method, most
        self._cached = lru_cache(most)(method)

    def __reduce__(self) -> tuple[type[Recent[T]], tuple[Callable[..., T], int]]:
        return Recent, (self._method, self._most)

    def __call__(self, *key: int) -> T:
        return self._cached(*key)
