"""Tensors that wait in host memory between forward and backward, so that the device holds none of them meanwhile.

Beside a GPU the copies run on a stream of their own: out while the next layer computes, and back one ahead of what
backward works on. On a CPU the same code copies within memory, which is how it is tested.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


class HostLine:
    """The layer inputs of one tower's forward, in the order in which its backward asks for them."""

    def __init__(self) -> None:
        self._layer: list[HostTensors] = []  # the latest layer's chunks; their copies may be under way

    def send(self, chunks: list[tuple[Tensor, ...]]) -> list[HostTensors]:
        """Sends the tensors of each chunk of a layer to host memory. Backward takes the layer's chunks first to last."""
        self.leave()  # the layer before has computed meanwhile
        sent = [HostTensors(tensors) for tensors in chunks]
        for copies, following in zip(sent, [*sent[1:], *self._layer[:1]], strict=False):
            copies.following = following
        self._layer = sent
        return sent

    def leave(self) -> None:
        """Lets go of what was sent: at the next layer, and after the last."""
        for copies in self._layer:
            copies.leave()


class HostTensors:
    """A few tensors of one chunk, in host memory until `back`."""

    def __init__(self, tensors: tuple[Tensor, ...]):
        self.following: HostTensors | None = None
        self._device = tensors[0].device
        self._there = tensors
        self._back: tuple[Tensor, ...] = ()
        self._event: torch.cuda.Event | None = None
        if self._device.type == "cpu":
            self._host = tuple(t.clone() for t in tensors)
            return
        self._host = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
        self._event = _copy(self._host, tensors, self._device)

    def leave(self) -> None:
        """Lets go of the device's tensors: work queued from here on waits until they are copied, and may use their memory."""
        if self._event is not None and self._there:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        self._there = ()

    def fetch(self) -> None:
        """Begins the copy back to the device, if it hasn't begun."""
        if self._back:
            return
        if self._device.type == "cpu":
            self._back, self._host = self._host, ()
            return
        # Taken from the current stream's memory, which the copy waits for, and given back to it: no stream is recorded.
        self._back = tuple(torch.empty_like(t, device=self._device) for t in self._host)
        self._event = _copy(self._back, self._host, self._device)
        self._host = ()

    def back(self) -> tuple[Tensor, ...]:
        """The tensors on their device, once. What backward asks for next begins its way meanwhile."""
        self.fetch()
        tensors, self._back = self._back, ()
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        if self.following is not None:
            self.following.fetch()
        self.following = None
        return tensors


def _copy(to: tuple[Tensor, ...], source: tuple[Tensor, ...], device: torch.device) -> torch.cuda.Event:
    """Copies on the copy stream, behind what the current stream has queued; the event says when they are done."""
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for there, here in zip(to, source, strict=True):
            there.copy_(here, non_blocking=True)
        event: torch.cuda.Event = stream.record_event()
    return event


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
