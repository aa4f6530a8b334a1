"""Multinomial logistic regression on features, in float64: the minimum itself, or the few epochs of AdamW that CLIP_benchmark takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# CLIP_benchmark's search: 97 strengths, 12 a decade; every 16th first, then steps of 8, 4, 2 and 1 about the best.
STRENGTHS: list[float] = np.logspace(-6, 2, num=97).tolist()
FIRST = range(0, 97, 16)
SPANS = (8, 4, 2, 1)
MOST_FITS = len(FIRST) + 2 * len(SPANS)  # of a search
Classifier = Callable[[Tensor], Tensor]  # features [n, d] to logits [n, classes]
Fit = Callable[[Tensor, Tensor, int, float], Classifier]


def fit_lbfgs(features: Tensor, labels: Tensor, classes: int, strength: float) -> Classifier:
    """The classifier that minimises mean cross entropy + strength / 2 · |weights|²; the bias is free, and begins at 0 as the weights do.

    features [n, d]; labels [n] int64. L-BFGS with a strong Wolfe search until no gradient exceeds 1e-7 (1,000 iterations at
    most); computed in float64 on the device of the features. scikit-learn's C is 1 / (n · strength).
    """
    features = features.double()
    parameters = torch.zeros(
        features.shape[1] + 1, classes, dtype=torch.float64, device=features.device, requires_grad=True
    )
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=1000, max_eval=4000, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = torch.addmm(parameters[-1], features, parameters[:-1])
        value = F.cross_entropy(logits, labels) + strength / 2 * parameters[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = parameters.detach()
    return lambda x: torch.addmm(found[-1], x.double(), found[:-1])


def fit_adamw(
    features: Tensor, labels: Tensor, classes: int, strength: float, *, lr: float = 0.1, epochs: int = 10, batch_size: int = 64,
    seed: int = 0,
) -> Classifier:  # fmt: skip
    """CLIP_benchmark's classifier: AdamW with weight decay `strength` and a cosine schedule, its defaults, its random numbers; float32.

    Not a minimum: it depends on lr, epochs, seed and the order of the samples. Source: clip_benchmark 1.6.2, linear_probe.py.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        linear = torch.nn.Linear(features.shape[1], classes)
        optimizer = torch.optim.AdamW(linear.parameters(), lr=lr, weight_decay=strength)
        samples = torch.utils.data.TensorDataset(features.float().cpu(), labels.cpu())
        loader = torch.utils.data.DataLoader(samples, batch_size, shuffle=True)
        steps, step = epochs * len(loader), 0
        for _ in range(epochs):
            for x, y in loader:
                for group in optimizer.param_groups:
                    group["lr"] = 0.5 * (1 + math.cos(math.pi * step / steps)) * lr
                optimizer.zero_grad()
                F.cross_entropy(linear(x), y).backward()
                optimizer.step()
                step += 1
    finally:
        torch.random.set_rng_state(state)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    return lambda x: F.linear(x.float().cpu(), weight, bias)


FITS: dict[str, Fit] = {"lbfgs": fit_lbfgs, "adamw": fit_adamw}


def search_strength(accuracy: Callable[[float], float]) -> float:
    """The strength of the best accuracy(strength) by CLIP_benchmark's search; the first among equals of a round, as there."""
    known: dict[int, float] = {}

    def best(places: Iterable[int]) -> int:
        chosen, most = 0, 0.0
        for place in places:
            if place not in known:
                known[place] = accuracy(STRENGTHS[place])
            if known[place] > most:
                chosen, most = place, known[place]
        return chosen

    peak = best(FIRST)
    for span in SPANS:
        peak = best((max(peak - span, 0), peak, min(peak + span, len(STRENGTHS) - 1)))
    return STRENGTHS[peak]
