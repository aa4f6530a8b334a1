"""Numbers on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class HostCopy:
    """Tensors as they are now, packed into one and copied without waiting; whoever looks at one first waits for the copy.

    All in float64: float32 values and counts below 2⁵³ keep every digit. They lie on one device.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._places: dict[str, tuple[int, torch.Size]] = {}  # where each begins, and its shape
        start = 0
        for name, x in tensors.items():
            self._places[name] = start, x.shape
            start += x.numel()
        packed = torch.cat([x.detach().double().flatten() for x in tensors.values()])
        self._arrived: torch.cuda.Event | None = None
        if packed.device.type == "cuda":
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(packed.device))
        else:
            self._host = packed

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        """That tensor in host memory, float64."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        start, shape = self._places[name]
        return self._host[start : start + shape.numel()].view(shape)
