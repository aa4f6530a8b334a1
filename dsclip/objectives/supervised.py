"""Supervised contrast of all views with each other, and hard pairs that are made by mixing features.

Khosla et al. 2020, "Supervised Contrastive Learning", eq. 2 (L_out); the hard pairs and the focal weight are Core-tuning's (Zhang et al. 2021, "Unleashing the
Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning"), mixtures here being of the unit features that are compared.

Shapes: n samples of this rank, N of all ranks, V features of a sample, M = V·N, D their width; r queries of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dsclip.config.objective_section import TermSection
from dsclip.errors import UserError
from dsclip.losses import Group, Negatives
from dsclip.losses.samples import widen
from dsclip.losses.tile_size import tile_shape
from dsclip.objectives.term import Features, TermGrads

TEMPERATURE = 0.07  # Core-tuning's
LEAST_SHARE = 0.8  # of the negative in a mixture with its query: Core-tuning's threshold


@dataclass(frozen=True)
class SupervisedContrast:
    """−mean_i 1/|P_i| Σ_{p ∈ P_i} w_ip·log p_ip over the M features of all views and ranks, p_i the softmax of z_i·z_c/τ over the candidates c of i.

    Candidates are all other features; those of an equal key are positives P_i. A query without any isn't counted. With `mixup` α a query that has
    positives and negatives gets two candidates of its own, λ ~ Beta(α, α) drawn for each:

    * a positive, λ·z_p + (1 − λ)·z_n of its least similar positive and most similar negative;
    * a negative, (1 − λ)·z_i + λ·z_n of itself and a random negative, λ at least 0.8,

    both scaled to length one. Which features are mixed is constant; gradients go through the mixtures. focal: w = 1 − p_ip, which has a gradient too;
    otherwise 1. entries: of a tile; None: by the device.
    """

    names: tuple[str, ...]
    temperature: float = TEMPERATURE
    mixup: float | None = None
    mixed: str = "both"
    focal: bool = False
    entries: int | None = None

    def __call__(self, features: Features, *, group: Group) -> TermGrads:
        if features.keys is None:
            raise UserError("the term supervised_contrast needs the key of each sample, and the batch has none")
        local = torch.stack([widen(features[name]) for name in self.names], 1)
        n, views = local.shape[:2]
        everyone = group.all_gather(local).flatten(0, 1).detach().requires_grad_()
        keys = group.all_gather(features.keys).repeat_interleave(views)
        drawn = None
        if self.mixup is not None:
            drawn = draws(features.seed, len(keys), self.mixup).to(everyone.dtype)
            drawn = (drawn.pin_memory() if everyone.is_cuda else drawn).to(everyone.device, non_blocking=True)
        first, total, sums = group.rank * n * views, len(keys), []
        gradient = torch.zeros_like(everyone)
        height, width = tile_shape(n * views, total, 1, self.entries, everyone.device)
        height = max(1, height * width // total)  # whole rows
        for start in range(first, first + n * views, height):
            rows = slice(start, min(start + height, first + n * views))
            with torch.enable_grad():
                value, counted = self._queries(everyone, keys, rows, None if drawn is None else drawn[:, rows])
            gradient += torch.autograd.grad(value, everyone)[0]
            sums.append(torch.stack([value.detach(), counted.to(value)]))
        value, counted = group.all_reduce_sum(torch.stack(sums).sum(0)).unbind()
        counted = counted.clamp(min=1)
        # A rank's queries have gradients for the candidates of all ranks.
        mine = group.all_reduce_sum(gradient)[first : first + n * views].view_as(local) / counted
        return TermGrads(value / counted, dict(zip(self.names, mine.unbind(1), strict=True)))

    def _queries(self, z: Tensor, keys: Tensor, rows: slice, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        """(sum over some queries, how many were counted). z [M, D], keys [M], drawn [3, r]."""
        index = torch.arange(len(keys), device=keys.device)
        own, same = index[rows, None] == index, keys[rows, None] == keys
        positive, negative = same & ~own, ~same
        cosines = z[rows] @ z.T
        made = None if drawn is None else self._mixtures(z, rows, cosines.detach(), positive, negative, drawn)
        left_out = own
        if made is not None:
            mixtures, of_own_kind = made
            cosines = torch.cat([cosines, (z[rows, None] * mixtures).sum(2)], 1)
            exists = (positive.any(1) & negative.any(1))[:, None].expand(-1, mixtures.shape[1])
            left_out = torch.cat([own, ~exists], 1)
            positive = torch.cat([positive, exists & of_own_kind], 1)
        # The lowest number and not −∞, of which an empty row would make NaN.
        logits = (cosines / self.temperature).masked_fill(left_out, torch.finfo(z.dtype).min)
        log_p = logits.log_softmax(1).masked_fill(~positive, 0)
        weighted = (1 - log_p.exp()) * log_p if self.focal else log_p
        counted = positive.any(1)
        return -(weighted.sum(1) / positive.sum(1).clamp(min=1)).sum(), counted.sum()

    def _mixtures(
        self, z: Tensor, rows: slice, cosines: Tensor, positive: Tensor, negative: Tensor, drawn: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(each query's own candidates [r, 1 or 2, D], which of them are positives [1 or 2])."""
        share, of_negative, which = drawn
        made, kinds = [], []
        if self.mixed != "negative":
            least = cosines.masked_fill(~positive, torch.inf).argmin(1)
            most = cosines.masked_fill(~negative, -torch.inf).argmax(1)
            made.append(torch.lerp(z[most], z[least], share[:, None]))
            kinds.append(True)
        if self.mixed != "positive":
            many = negative.sum(1)  # of a query's negatives, in their order; float32 rounds what is nearly 1 to 1
            chosen = (which * many).floor().minimum(many - 1)
            random = (negative.cumsum(1) > chosen[:, None]).int().argmax(1)
            made.append(torch.lerp(z[rows], z[random], of_negative[:, None]))
            kinds.append(False)
        # Filled on the device: for a copy of them the host would wait.
        of_own_kind = torch.stack([torch.full((), kind, device=z.device) for kind in kinds])
        return normalize(torch.stack(made, 1), dim=2), of_own_kind


def draws(seed: tuple[int, int], queries: int, alpha: float) -> Tensor:
    """[3, queries], float64, a function of the run's seed and the step: λ of the positives, λ of the negatives, and which negative, in [0, 1)."""
    rng = np.random.Generator(np.random.PCG64(list(seed)))
    of_positive, of_negative = rng.beta(alpha, alpha, (2, queries))
    drawn = np.stack([of_positive, np.maximum(of_negative, LEAST_SHARE), rng.random(queries)])
    return torch.from_numpy(drawn)


def supervised_contrast(settings: TermSection, negatives: Negatives) -> SupervisedContrast:
    """The term of these settings."""
    return SupervisedContrast(
        tuple(settings.between), settings.temperature or TEMPERATURE, settings.mixup, settings.mixed or "both", bool(settings.focal)
    )  # fmt: skip
