"""Word repetition: a caption with some of its words written twice, as another view of it."""

from __future__ import annotations

import numpy as np


def repeat_words(caption: str, rate: float, rng: np.random.Generator) -> str:
    """The caption of N words with r of them doubled where they stand; r is uniform in 0 … max(2, rate·N), at most N.

    Wu et al. 2022, "ESimCSE", section 3.1, on words where they have sub-words. It changes a text's length and not what it
    says, so that a text tower can't tell positives from others by their lengths.
    """
    words = caption.split()
    most = min(len(words), max(2, int(rate * len(words))))
    doubled = set(rng.choice(len(words), size=int(rng.integers(most + 1)), replace=False).tolist())
    return " ".join(f"{word} {word}" if i in doubled else word for i, word in enumerate(words))
