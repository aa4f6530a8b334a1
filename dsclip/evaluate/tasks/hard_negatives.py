"""Does an image prefer its own captions to hard negatives that were written for it? SugarCrepe and ARO ask this.

Sources: Yuksekgonul et al. 2023 (ARO), Hsieh et al. 2023 (SugarCrepe).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.errors import UserError
from dsclip.evaluate.results.result import Measured, Outcomes, by_group
from dsclip.evaluate.tasks.captioned import Captioned
from dsclip.evaluate.tasks.task import Embedded, Options, TaskKind


class HardNegatives:
    """`accuracy`: the share of pairs (own caption, hard negative of the same image) in which the own caption is the more
    similar one; 0.5 by chance, and equal similarities lose. Images without hard negatives don't count. Where an image has several,
    `precision@1` is the share of own captions that are more similar than all of them, as ARO's order sets ask. Of sets with parts
    (SugarCrepe's files, ARO's relations) also of each part, and the mean over parts."""

    def __init__(self, dataset: EvalDataset, options: Options):
        self._groups = dataset.groups
        self._several = not options.brief and any(len(negatives) > 1 for negatives in dataset.negatives)
        self._captioned = Captioned(dataset, hard_negative_samples(dataset))
        self.images, self.texts = self._captioned.images, self._captioned.texts
        self.protocol = {"equal_similarities": "lose"}

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """{"accuracy", "precision@1" where there are several hard negatives, both of parts, "images", "pairs"}."""
        similarity, whole = self._captioned.similarities(images, text)
        wins, samples, first, of_first = [], [], [], []
        for place in whole:
            start, middle, stop = self._captioned.spans[place]
            won = similarity[start:middle, None] > similarity[None, middle:stop]
            wins.append(won.flatten())
            samples += [place] * won.numel()
            first.append(won.all(dim=1))
            of_first += [place] * len(won)
        counts = {"images": len(images[0].indices), "pairs": len(samples)}
        found = self._outcomes("accuracy", wins, samples)
        return Measured(found | self._outcomes("precision@1", first, of_first) if self._several else found, counts)

    def _outcomes(self, name: str, wins: list[Tensor], places: list[int]) -> dict[str, Outcomes]:
        """A metric, and that of parts. places: in `samples` of each win."""
        units = torch.tensor([self._captioned.photos[place] for place in places])
        found = Outcomes(torch.cat(wins).float(), units)
        groups = [self._groups[self._captioned.samples[place]] for place in places]
        return {name: found, **by_group(name, found, groups)}


HARD_NEGATIVES = TaskKind("hard_negatives", HardNegatives)


def hard_negative_samples(dataset: EvalDataset, captions: int = 1) -> list[int]:
    """The samples that have as many captions and hard negatives. Raises UserError when none has."""
    indices = [
        i
        for i, (own, negatives) in enumerate(zip(dataset.captions, dataset.negatives, strict=True))
        if len(own) >= captions and negatives
    ]
    if not indices:
        several = "" if captions == 1 else f" and {captions} captions an image"
        raise UserError(
            f"this task needs hard negatives{several}; give samples a .neg.txt member or a list under `negatives` in their .json"
        )
    return indices
