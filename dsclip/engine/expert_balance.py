"""Keeps the experts of routed blocks about equally loaded, without a term in the loss (Wang et al. 2024, arXiv 2408.15664).

After a step an expert that had more than its share of the global batch's tokens becomes one step less likely to be chosen, and one
that had less becomes one more. Counts are added up over ranks, micro-batches and chunks, each token once: however the batch is cut,
the balance moves alike, and no gradient knows of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dsclip.distributed import Collectives
from dsclip.model.experts import RoutedBlock, RoutedMlp

EXPERT = "expert_"  # before the blocks' names among a step's numbers


class ExpertBalance:
    """The routed blocks of a model that are trained; there may be none, and then this does nothing. L of them, N experts."""

    def __init__(self, model: nn.Module, group: Collectives, device: torch.device):
        """Collective with routed blocks: rank 0's balance counts."""
        self._group = group
        routed = {name: module.mlp for name, module in model.named_modules() if isinstance(module, RoutedBlock)}
        for mlp in routed.values():
            mlp.balance.copy_(torch.tensor(group.broadcast_object(mlp.balance.tolist())))
        self._mlps = {name: mlp for name, mlp in routed.items() if any(p.requires_grad for p in mlp.parameters())}
        experts = max((len(mlp.experts) for mlp in routed.values()), default=1)
        self._counts = torch.zeros(len(self._mlps), experts, dtype=torch.int64, device=device)
        self._loads = self._counts.clone()  # of the last step, of all ranks

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within it forwards count the tokens of each expert; what is run again later must not be."""
        for mlp, counts in self._pairs():
            mlp.counted = counts
        try:
            yield
        finally:
            for mlp, _ in self._pairs():
                mlp.counted = None

    def step(self, *, applied: bool) -> None:
        """Moves the balance by what was counted since the last step; a step that isn't applied leaves it. Collective, nothing is read."""
        if not self._mlps:
            return
        self._loads = self._group.all_reduce_sum(self._counts)
        self._counts.zero_()
        if applied:
            mean_times = self._loads.sum(dim=1, keepdim=True)
            moves = (mean_times - self._loads * self._loads.shape[1]).sign()
            for (mlp, _), move in zip(self._pairs(), moves, strict=True):
                mlp.balance += move

    def numbers(self) -> dict[str, Tensor]:
        """Of each routed block, the share of the last step's tokens that its busiest expert had, on the device. 1/N is even."""
        shares = self._loads.amax(dim=1) / self._loads.sum(dim=1).clamp(min=1)
        return {EXPERT + name: share for name, share in zip(self._mlps, shares, strict=True)}

    def _pairs(self) -> Iterator[tuple[RoutedMlp, Tensor]]:
        return zip(self._mlps.values(), self._counts, strict=True)
