"""Persisted ZeRO-3 parameters travel together: one all-gather for many, where DeepSpeed 0.19.8 calls one for each.

After the optimizer's step every persisted parameter is gathered anew, each by a collective of its own, and then the device
is waited for: hundreds of tiny collectives a step when all parameters are persisted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

FLAT_NUMBERS = 100_000_000  # of one gather, all ranks' shards together: bounds the copy that it needs for a moment

Parameters = Sequence[Any]  # torch's, with what DeepSpeed hangs on them (ds_tensor, ds_numel, ds_shape)
Coalesced = Callable[..., None]


def gather_flat(original: Coalesced, gather_into: Callable[..., object]) -> Coalesced:
    """In place of DeepSpeed's `Init._allgather_params_coalesced`, which stays for what is quantized or needs no ranks.

    gather_into: DeepSpeed's `all_gather_into_tensor(whole, shard, group=)`.
    """

    def gather(self: Any, params: Parameters, hierarchy: int = 0, quantize: bool = False) -> None:
        if quantize or len(params) < 2 or self._partition_world_size(params[0]) == 1:
            original(self, params, hierarchy, quantize)
            return
        ranks, group = self._partition_world_size(params[0]), self.get_partition_dp_group(params[0])
        for together in in_buckets(params, FLAT_NUMBERS):
            shards = [p.ds_tensor.detach().to(self.local_device).view(-1) for p in together]
            mine = torch.cat(shards)
            whole = torch.empty(ranks * mine.numel(), dtype=mine.dtype, device=mine.device)
            gather_into(whole, mine, group=group)
            put_together(together, whole.view(ranks, -1), [len(shard) for shard in shards])

    return gather


def in_buckets(params: Parameters, numbers: int) -> Iterator[list[Any]]:
    """The parameters in order, in runs of one dtype with at most so many numbers; a larger one is a run by itself."""
    run: list[Any] = []
    for p in params:
        size = sum(q.ds_numel for q in run) + p.ds_numel
        if run and (size > numbers or p.ds_tensor.dtype != run[0].ds_tensor.dtype):
            yield run
            run = []
        run.append(p)
    if run:
        yield run


def put_together(params: Parameters, rows: Tensor, sizes: list[int]) -> None:
    """Gives each parameter its values from rows [ranks, sum of sizes], in which the shards of all lie side by side."""
    for p, shards in zip(params, rows.split(sizes, dim=1), strict=True):
        p.data = shards.reshape(-1).narrow(0, 0, p.ds_numel).view(p.ds_shape)
