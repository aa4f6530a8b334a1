"""Which models go into an average: all, or those that make it better. Source: Wortsman et al. 2022, "Model soups"."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def greedy(alone: Sequence[float], score: Callable[[Sequence[int]], float]) -> tuple[list[int], float]:
    """(which models, the score of their average): the paper's recipe 1. Its score is never below the best model's alone.

    alone: each model's own score, higher is better. score: that of the average of some models, by their places. From the best
    model downwards, each stays in the average if the score doesn't fall by it.
    """
    order = sorted(range(len(alone)), key=lambda i: -alone[i])
    chosen, best = order[:1], alone[order[0]]
    for model in order[1:]:
        found = score([*chosen, model])
        if found >= best:
            chosen, best = [*chosen, model], found
    return chosen, best
