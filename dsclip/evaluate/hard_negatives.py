"""Does an image prefer its own captions to hard negatives that were written for it? (As in ARO, Yuksekgonul et al. 2023.)"""

from __future__ import annotations

from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.errors import UserError
from dsclip.evaluate.features import Embedder


def hard_negatives(embedder: Embedder, dataset: EvalDataset) -> dict[str, float]:
    """{"accuracy", "images", "pairs"}: the share of pairs (own caption, hard negative of the same image) in which the
    own caption is the more similar one; 0.5 by chance. Images without hard negatives don't count. Collective.
    """
    images, indices = embedder.images(dataset, hard_negative_samples(dataset))
    texts = [t for i in indices for t in (*dataset.captions[i], *dataset.negatives[i])]
    features = embedder.texts(texts)
    right = pairs = start = 0
    for row, i in enumerate(indices):
        middle = start + len(dataset.captions[i])
        stop = middle + len(dataset.negatives[i])
        wins = _wins(images[row], features[start:middle], features[middle:stop])
        right, pairs, start = right + int(wins.sum()), pairs + wins.numel(), stop
    return {"accuracy": right / pairs, "images": len(indices), "pairs": pairs}


def hard_negative_samples(dataset: EvalDataset) -> list[int]:
    """The samples that have captions and hard negatives. Raises UserError when none has."""
    indices = [
        i
        for i, (captions, negatives) in enumerate(zip(dataset.captions, dataset.negatives, strict=True))
        if captions and negatives
    ]
    if not indices:
        raise UserError(
            "this task needs hard negatives; give samples a .neg.txt member or a list under `negatives` in their .json"
        )
    return indices


def _wins(image: Tensor, captions: Tensor, negatives: Tensor) -> Tensor:
    """bool [captions, negatives] for an image [d], features of captions [captions, d] and of negatives [negatives, d]."""
    return (captions @ image)[:, None] > (negatives @ image)[None, :]
