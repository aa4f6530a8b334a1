"""Which of these pictures belong to a word? WinoGAViL's associations (Bitton et al. 2022, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.errors import UserError
from dsclip.evaluate.features import check_finite
from dsclip.evaluate.results.result import Measured, Outcomes, by_group
from dsclip.evaluate.tasks.task import Embedded, Images, Options, TaskKind

SPLITS = {"5-6": range(7), "10-12": range(10, 1 << 20)}  # numbers of candidates, as DataComp names and bounds them


class Associations:
    """`jaccard`: of a cue with k associations among its candidates the k most similar pictures are taken, and what is taken right is
    divided by what is taken or an association; among equally similar candidates the first counts. Also by numbers of candidates."""

    def __init__(self, dataset: EvalDataset, options: Options):
        if not dataset.cues:
            raise UserError(
                "this task needs cues with candidates and associations, as WinoGAViL has them (see docs/evaluation.md)"
            )
        self._image_of, self._labels = dataset.same_images(), dataset.labels
        cues: dict[str | None, list[int]] = {}
        for i, group in enumerate(dataset.groups):
            cues.setdefault(group, []).append(i)
        self._cues = list(cues.values())
        self.images = (Images(dataset, sorted(set(self._image_of))),)
        self.texts = [prompt(dataset.captions[candidates[0]][0]) for candidates in self._cues]
        self.protocol = {"prompt": "A or An, and the cue in small letters", "equal_similarities": "lower index first"}

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """{"jaccard", "jaccard_5-6", "jaccard_10-12", of each number of candidates where there are several, "cues", "images"}.

        A cue of which a candidate is broken doesn't count.
        """
        check_finite("text features", text)
        features, decoded = images[0]
        row_of = {index: row for row, index in enumerate(decoded)}
        scores, units, sizes = [], [], []
        for cue, candidates in zip(text, self._cues, strict=True):
            rows = [row_of.get(self._image_of[i], -1) for i in candidates]
            if min(rows) < 0:
                continue
            own = torch.tensor([bool(self._labels[i]) for i in candidates])
            scores.append(jaccard((features[rows] * cue).sum(dim=1), own))
            units.append(candidates[0])
            sizes.append(len(candidates))
        if not scores:
            raise UserError("no cue has all its candidates: their images can't be decoded")
        values, of_sample = torch.tensor(scores, dtype=torch.float64), torch.tensor(units)
        outcomes = {"jaccard": Outcomes(values, of_sample)}
        for name, numbers in SPLITS.items():
            inside = torch.tensor([size in numbers for size in sizes])
            if inside.any():
                outcomes[f"jaccard_{name}"] = Outcomes(values[inside], of_sample[inside])
        outcomes |= by_group("jaccard", outcomes["jaccard"], [f"{size}_candidates" for size in sizes])
        return Measured(outcomes, {"cues": len(scores), "images": len(decoded)})


ASSOCIATIONS = TaskKind("associations", Associations)


def prompt(cue: str) -> str:
    """WinoGAViL's sentence: the cue in small letters after its article."""
    return f"{'An' if cue[0].lower() in 'aeiou' else 'A'} {cue.lower()}"


def jaccard(similarity: Tensor, own: Tensor) -> float:
    """Of candidates' similarities [n] and which of them are associations, bool [n], at least one."""
    count = int(own.sum())
    taken = similarity.argsort(descending=True, stable=True)[:count]
    right = int(own[taken].sum())
    return right / (2 * count - right)
