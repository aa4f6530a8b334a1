"""A span of words: some of a caption's words that stand next to each other, as another view of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def span_of_words(caption: str, shares: Sequence[float], rng: np.random.Generator) -> str:
    """Of a caption of N words a share s of them, at least one, at a random place; s is uniform in shares [low, high].

    Two of these, drawn independently, are a positive pair (Izacard et al. 2022, "Unsupervised Dense Information Retrieval with Contrastive Learning":
    independent cropping), on words where they have sub-words.
    """
    low, high = shares
    words = caption.split()
    kept = max(1, round(rng.uniform(low, high) * len(words)))
    start = int(rng.integers(max(1, len(words) - kept + 1)))
    return " ".join(words[start : start + kept])
