"""The losses as their papers write them: dense, float64, autograd. A few lines each, to be checked by eye.

Shapes: N pairs, M hard negatives, Q queued pairs. Everything that is held constant is detached.
"""

import torch
import torch.nn.functional as F

from dsclip.losses import Negatives


def cosine(x, y):
    """[r, c] from rows to columns; the same from columns to rows."""
    return x @ y.T


def late_interaction(x, y, x_valid, y_valid):
    """FILIP eq. 4: the mean over x's tokens of the best match among y's, [r, c]."""
    each = torch.einsum("rkd,cld->rckl", x, y).masked_fill(~y_valid[None, :, None, :], -torch.inf)
    best = each.max(dim=3).values
    return (best * x_valid[:, None]).sum(2) / x_valid.double().sum(1)[:, None]


def candidate_masks(logits, own, keys, candidate_keys, scale, options, in_batch):
    """(positive, excluded) [r, c] of one block of candidates."""
    identity = torch.eye(*logits.shape, dtype=torch.bool) if in_batch else torch.zeros_like(logits, dtype=torch.bool)
    positive, excluded = identity.clone(), torch.zeros_like(identity)
    if options.duplicates != "negative" and keys is not None:
        same = keys[:, None] == candidate_keys[None]
        if in_batch and options.duplicates == "positive":
            positive |= same
        else:
            excluded |= same
    if options.filter_margin is not None:
        excluded |= logits.detach() > own.detach()[:, None] - options.filter_margin * scale
    return positive, excluded & ~positive


def blocks(similar, rows, batch, keys, scale, options, hard=None, hard_owner=None, queue=None, queue_keys=None):
    """All candidates of one direction side by side: logits, positive, excluded, each [N, N + M + Q]."""
    logits = [scale * similar(rows, batch)]
    own = logits[0].diagonal()
    masks = [candidate_masks(logits[0], own, keys, keys, scale, options, True)]
    if hard is not None:
        logits.append(scale * similar(rows, hard))
        none = torch.zeros_like(logits[-1], dtype=torch.bool)
        foreign = torch.arange(len(none))[:, None] != hard_owner[None]
        masks.append((none, foreign if options.hard == "own" else none))
    if queue is not None:
        logits.append(scale * similar(rows, queue))
        masks.append(candidate_masks(logits[-1], own, keys, queue_keys, scale, options, False))
    return torch.cat(logits, 1), torch.cat([m[0] for m in masks], 1), torch.cat([m[1] for m in masks], 1)


def negative_weights(logits, positive, excluded, beta):
    """w_ij ∝ exp(β·S_ij) with mean 1 over a row's negatives, 1 for positives."""
    raw = (beta * logits.detach()).exp().masked_fill(positive | excluded, 0)
    count = (~(positive | excluded)).sum(1, keepdim=True)
    weights = raw / (raw.sum(1, keepdim=True) / count.clamp_min(1)).clamp_min(1e-300)
    return torch.where(positive, 1.0, weights)


def debiased_lse(logits, weights, positive, excluded, made, share, scale):
    """Chuang et al. 2020: log(P + K·g + C), g = max((mean of w·exp(S) − τ⁺·mean over positives) / (1 − τ⁺), exp(−s))."""
    drawn, each = ~(positive | excluded) & ~made, weights * logits.exp()
    count, pos = drawn.sum(1).double(), (each * positive).sum(1)
    least = count * (-scale).exp()
    g = torch.maximum(((each * drawn).sum(1) - share * count * pos / positive.sum(1)) / (1 - share), least)
    return (pos + g + (each * made * ~excluded).sum(1)).log()


def cross_entropy(logits, positive, excluded, options: Negatives, scale, made):
    """Mean over rows of log Σ_j w_ij·exp(S_ij) − Σ_j y_ij·S_ij. made: columns of hard negatives."""
    weights = negative_weights(logits, positive, excluded, options.beta)
    if options.debiased:
        lse = debiased_lse(logits, weights, positive, excluded, made, options.debiased, scale)
    else:
        weighted = logits + weights.log().masked_fill(excluded, 0)
        lse = torch.logsumexp(weighted.masked_fill(excluded, -torch.inf), 1)
    target = (1 - options.label_smoothing) * positive.double() / positive.sum(1, keepdim=True)
    target = target + options.label_smoothing * (~excluded).double() / (~excluded).sum(1, keepdim=True)
    return (lse - (target * logits).sum(1)).mean()


def pairwise_sigmoid(logits, positive, excluded, bias, options: Negatives):
    """The sum over entries of w·BCE(S + b, y), divided by the number of rows."""
    weights = negative_weights(logits, positive, excluded, options.beta).masked_fill(excluded, 0)
    target = positive.double() * (1 - options.label_smoothing) + options.label_smoothing / 2
    each = F.binary_cross_entropy_with_logits(logits + bias, target, reduction="none")
    return (weights * each).sum() / len(logits)


def loss(name, image, text, log_scale, bias, options, similar, keys=None, hard=None, hard_owner=None, queue=None):
    """The value of loss `name`. queue: (image features, text features, keys) or None."""
    scale = log_scale.exp()
    queue_image, queue_text, queue_keys = queue or (None, None, None)
    to_text = blocks(similar, image, text, keys, scale, options, hard, hard_owner, queue_text, queue_keys)
    to_image = blocks(similar, text, image, keys, scale, options, queue=queue_image, queue_keys=queue_keys)
    if name != "sigmoid":
        made = torch.zeros(to_text[0].shape[1], dtype=torch.bool)
        made[len(image) : len(image) + (0 if hard is None else len(hard))] = True
        none = torch.zeros(to_image[0].shape[1], dtype=torch.bool)
        return (cross_entropy(*to_text, options, scale, made) + cross_entropy(*to_image, options, scale, none)) / 2
    value = pairwise_sigmoid(*to_text, bias, options)
    if queue is not None:  # the batch's entries are counted once, by the images' rows
        N = len(image)
        value = value + pairwise_sigmoid(*(x[:, N:] for x in to_image), bias, options)
    return value
