"""Swapped prediction of prototypes between two views (SwAV, Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments").

Shapes: n samples of this rank, N of all ranks, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsclip.config.objective_section import TermSection, head_of
from dsclip.errors import UserError
from dsclip.losses import Group, Negatives
from dsclip.objectives.term import Features, TermGrads

TEMPERATURE, EPSILON, ITERATIONS = 0.1, 0.05, 3  # SwAV's, §3.1 and appendix A


@dataclass(frozen=True)
class Swav:
    """½·(ℓ(z₁, q₂) + ℓ(z₂, q₁)) averaged over the global batch, ℓ(z, q) = −Σ_k q_k·log softmax(z·c/τ)_k (eq. 1 and 2).

    The codes q are constants: those of a view solve eq. 3 to 5 over the global batch, see `codes`.
    """

    one: str
    other: str
    temperature: float
    epsilon: float
    iterations: int

    def __call__(self, features: Features, *, group: Group) -> TermGrads:
        scores = [features[self.one], features[self.other]]
        targets = [codes(x, self.epsilon, self.iterations, group) for x in reversed(scores)]
        log_p = [(x / self.temperature).log_softmax(dim=1) for x in scores]
        total = 2 * group.world_size * len(scores[0])
        value = (
            group.all_reduce_sum(-torch.stack([(q * x).sum() for q, x in zip(targets, log_p, strict=True)]).sum())
            / total
        )
        # The codes of a sample add up to 1, so that softmax − code is the whole gradient.
        grads = [(x.exp() - q) / (self.temperature * total) for q, x in zip(targets, log_p, strict=True)]
        return TermGrads(value, dict(zip((self.one, self.other), grads, strict=True)))


def codes(scores: Tensor, epsilon: float, iterations: int, group: Group) -> Tensor:
    """Q* = Diag(u)·exp(scores/ε)·Diag(v) by Sinkhorn-Knopp over the global batch (eq. 5). Collective.

    scores [n, K] -> codes [n, K]. A sample's add up to 1 exactly, as each iteration ends with them; a prototype's to N/K over all ranks as closely as
    the iterations have come. In logarithms, as a small ε leaves float32's range. Ranks exchange K numbers an iteration.
    """
    log_q = scores / epsilon
    for _ in range(iterations):
        of_prototypes = group.all_gather(log_q.logsumexp(dim=0, keepdim=True)).logsumexp(dim=0)
        log_q = log_q - of_prototypes
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()


def swav(settings: TermSection, negatives: Negatives) -> Swav:
    """The term of these settings."""
    heads = [head_of(name) for name in settings.between]
    if len(heads) != 2 or heads[0] != heads[1]:
        raise UserError(
            f"objective.terms: `swav` is between {', '.join(settings.between)}; give two views of one head's prototypes, such as "
            "[image_2.prototypes, image_3.prototypes]"
        )
    one, other = settings.between
    return Swav(
        one, other, settings.temperature or TEMPERATURE, settings.epsilon or EPSILON, settings.iterations or ITERATIONS
    )
