"""The terms of the objective as their papers write them: dense, float64, autograd."""

import torch


def info_nce(one, other, scale, keys=None, duplicates="negative"):
    """Of CLIP (Radford et al. 2021, figure 3), between any two features [N, D]; equal keys positive: of Khosla et al. 2020, eq. 2."""
    logits, own = scale * one @ other.T, torch.eye(len(one), dtype=torch.bool)
    same = own if keys is None or duplicates == "negative" else keys[:, None] == keys
    if duplicates == "mask":
        logits, same = logits.masked_fill(same & ~own, -torch.inf), own
    target = same.double() / same.sum(1, keepdim=True)
    rows, columns = logits.log_softmax(1), logits.log_softmax(0).T
    return -sum((target * x.masked_fill(~same, 0)).sum(1).mean() for x in (rows, columns)) / 2


def objective(views, log_scale, pair_weight, terms, keys=None):
    """w·InfoNCE(image, text) + Σ w_k·InfoNCE(between), at the term's temperature or the shared one."""
    total = pair_weight * info_nce(views["image"], views["text"], log_scale.exp())
    for term in terms:
        scale = log_scale.exp() if term.temperature is None else 1 / term.temperature
        total = total + term.weight * info_nce(
            *(views[n] for n in term.between), scale, keys, term.duplicates or "negative"
        )
    return total
