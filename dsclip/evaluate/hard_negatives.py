"""Does an image prefer its own captions to hard negatives that were written for it? (As in ARO, Yuksekgonul et al. 2023.)"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.errors import UserError
from dsclip.evaluate.result import Measured, Outcomes
from dsclip.evaluate.task import Embedded, Images, Options, TaskKind


class HardNegatives:
    """`accuracy`: the share of pairs (own caption, hard negative of the same image) in which the own caption is the more
    similar one; 0.5 by chance, and equal similarities lose. Images without hard negatives don't count."""

    def __init__(self, dataset: EvalDataset, options: Options):
        self._dataset, self._indices = dataset, hard_negative_samples(dataset)
        self.protocol = {"equal_similarities": "lose"}
        self.images = (Images(dataset, self._indices),)
        self.texts = [t for i in self._indices for t in (*dataset.captions[i], *dataset.negatives[i])]

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """{"accuracy", "images", "pairs"}."""
        (image, decoded), dataset = images[0], self._dataset
        row_of = {index: row for row, index in enumerate(decoded)}
        wins, units, start = [], [], 0
        for i in self._indices:
            middle = start + len(dataset.captions[i])
            stop = middle + len(dataset.negatives[i])
            if i in row_of:
                won = _wins(image[row_of[i]], text[start:middle], text[middle:stop]).flatten()
                wins.append(won)
                units.append(torch.full((len(won),), i))
            start = stop
        outcomes = Outcomes(torch.cat(wins).float(), torch.cat(units))
        return Measured({"accuracy": outcomes}, {"images": len(decoded), "pairs": len(outcomes.values)})


HARD_NEGATIVES = TaskKind("hard_negatives", HardNegatives)


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
