"""The terms of the objective as their papers write them: dense, float64, autograd."""

import torch


def info_nce(one, other, scale):
    """Of CLIP (Radford et al. 2021, figure 3), between any two features [N, D]."""
    logits, target = scale * one @ other.T, torch.arange(len(one))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def objective(views, log_scale, pair_weight, terms):
    """w·InfoNCE(image, text) + Σ w_k·InfoNCE(between), at the term's temperature or the shared one."""
    total = pair_weight * info_nce(views["image"], views["text"], log_scale.exp())
    for term in terms:
        scale = log_scale.exp() if term.temperature is None else 1 / term.temperature
        total = total + term.weight * info_nce(*(views[name] for name in term.between), scale)
    return total
