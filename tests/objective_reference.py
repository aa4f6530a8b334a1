"""The terms of the objective as their papers write them: dense, float64, autograd."""

import torch

from dsclip.objectives.supervised import draws


def info_nce(one, other, scale, keys=None, duplicates="negative"):
    """Of CLIP (Radford et al. 2021, figure 3), between any two features [N, D]; equal keys positive: of Khosla et al. 2020, eq. 2."""
    logits, own = scale * one @ other.T, torch.eye(len(one), dtype=torch.bool)
    same = own if keys is None or duplicates == "negative" else keys[:, None] == keys
    if duplicates == "mask":
        logits, same = logits.masked_fill(same & ~own, -torch.inf), own
    target = same.double() / same.sum(1, keepdim=True)
    rows, columns = logits.log_softmax(1), logits.log_softmax(0).T
    return -sum((target * x.masked_fill(~same, 0)).sum(1).mean() for x in (rows, columns)) / 2


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """The codes [N, K] of SwAV, as the pseudo-code of Caron et al. 2020, appendix A, has them."""
    q = (scores / epsilon).exp().T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * len(q)
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q / q.sum(0, keepdim=True)).T


def swav(one, other, temperature=0.1, epsilon=0.05, iterations=3):
    """Of Caron et al. 2020, eq. 1 and 2, halved: the mean of both directions, as their code has it."""
    swapped = lambda x, q: -(q * (x / temperature).log_softmax(1)).sum(1).mean()  # noqa: E731
    q_one, q_other = (sinkhorn(x, epsilon, iterations) for x in (one, other))
    return (swapped(one, q_other) + swapped(other, q_one)) / 2


def supervised(features, keys, drawn, temperature=0.07, mixup=None, mixed="both", focal=False):
    """L_out of Khosla et al. 2020, eq. 2, over all features of all samples, with the hard pairs of Zhang et al. 2021, one query after the other.

    drawn: [3, M], the shares λ of the positives, of the negatives, and which negative.
    """
    z, y = torch.stack(features, 1).flatten(0, 1), keys.repeat_interleave(len(features)).tolist()
    values = []
    for i, query in enumerate(z):
        positives = [j for j in range(len(z)) if j != i and y[j] == y[i]]
        negatives = [j for j in range(len(z)) if y[j] != y[i]]
        if not positives:
            continue
        of_positives, of_negatives = [z[j] for j in positives], [z[j] for j in negatives]
        if mixup is not None and negatives:
            share, other, which = drawn[:, i].tolist()
            similar = (z @ query).detach()
            hard = z[min(positives, key=lambda j: similar[j])], z[max(negatives, key=lambda j: similar[j])]
            chosen = z[negatives[int(which * len(negatives))]]
            made = share * hard[0] + (1 - share) * hard[1], (1 - other) * query + other * chosen
            of_positives += [made[0] / made[0].norm()] if mixed != "negative" else []
            of_negatives += [made[1] / made[1].norm()] if mixed != "positive" else []
        p = (torch.stack(of_positives + of_negatives) @ query / temperature).softmax(0)[: len(of_positives)]
        values.append(-((1 - p if focal else 1) * p.log()).mean())
    return torch.stack(values).mean() if values else 0 * z.sum()


def term_value(term, features, log_scale, keys, classes, seed):
    """One term of the objective."""
    if term.name == "supervised_contrast":
        settings = {k: x for k in ("temperature", "mixup", "mixed", "focal") if (x := getattr(term, k)) is not None}
        return supervised(features, keys, draws(seed, len(features) * len(keys), term.mixup or 1.0), **settings)
    if term.name == "swav":
        settings = {k: getattr(term, k) for k in ("temperature", "epsilon", "iterations")}
        return swav(*features, **{k: x for k, x in settings.items() if x is not None})
    if term.name == "cross_entropy":
        return torch.nn.functional.cross_entropy(*features, classes, label_smoothing=term.label_smoothing or 0.0)
    scale = log_scale.exp() if term.temperature is None else 1 / term.temperature
    return info_nce(*features, scale, keys, term.duplicates or "negative")


def distill(one, other, scale, teacher_one, teacher_other, teacher_scale):
    """KL of the softmax over rows, and over columns, from the teacher's (Yang et al. 2024, CRD; Vasu et al. 2024, eq. 1)."""
    logits, goal = scale * one @ other.T, teacher_scale * teacher_one @ teacher_other.T
    return (
        sum(
            torch.nn.functional.kl_div(x.log_softmax(1), t.softmax(1), reduction="batchmean")
            for x, t in ((logits, goal), (logits.T, goal.T))
        )
        / 2
    )


def distill_features(pairs):
    """Mean squared distance of unit features (Yang et al. 2024, FD, without its factor of 1/D)."""
    return sum((student - teacher).square().sum(1).mean() for student, teacher in pairs)


def objective(views, log_scale, pair_weight, terms, keys=None, classes=None, seed=(0, 0)):
    """w·InfoNCE(image, text) + Σ w_k·term_k, each at its own temperature or the shared one."""
    total = pair_weight * info_nce(views["image"], views["text"], log_scale.exp())
    for term in terms:
        total = total + term.weight * term_value(term, [views[n] for n in term.between], log_scale, keys, classes, seed)
    return total
