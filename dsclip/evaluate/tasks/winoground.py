"""Two images and two captions of the same words: Winoground's three scores (Thrush et al. 2022, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.errors import UserError
from dsclip.evaluate.results.result import Measured, Outcomes, by_group
from dsclip.evaluate.tasks.captioned import Captioned
from dsclip.evaluate.tasks.task import Embedded, Options, TaskKind


class Winoground:
    """Shares of the pairs; equal similarities lose.

    `text`: each image is nearer to its own caption than to the other's, 1/4 by chance; `image`: each caption is nearer to its own
    image, 1/4; `group`: both, 1/6.
    """

    def __init__(self, dataset: EvalDataset, options: Options):
        if not dataset.pairs:
            raise UserError("this task needs Winoground's pairs: a folder with examples.jsonl (see docs/evaluation.md)")
        self._groups = dataset.groups
        self._captioned = Captioned(dataset, list(range(len(dataset))))
        self.images, self.texts = self._captioned.images, self._captioned.texts
        self.protocol = {"equal_similarities": "lose"}

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """{"text", "image", "group", of tags, "samples"}. A pair of which an image is broken doesn't count."""
        similarity, whole = self._captioned.similarities(images, text)
        usable = set(whole)
        pairs = [i for i in whole if i % 2 == 0 and i + 1 in usable]
        if not pairs:
            raise UserError("no pair has two images that can be decoded")
        # The texts of a pair are: caption 0, caption 1 (of image 0), caption 1, caption 0 (of image 1).
        s = similarity.view(-1, 4)[torch.tensor(pairs) // 2]
        text_score = (s[:, 0] > s[:, 1]) & (s[:, 2] > s[:, 3])
        image_score = (s[:, 0] > s[:, 3]) & (s[:, 2] > s[:, 1])
        units = torch.tensor([self._captioned.samples[i] for i in pairs])
        scores = {"text": text_score, "image": image_score, "group": text_score & image_score}
        outcomes = {name: Outcomes(score.float(), units) for name, score in scores.items()}
        groups = [self._groups[self._captioned.samples[i]] for i in pairs]
        parts = {name: of for score in scores for name, of in by_group(score, outcomes[score], groups).items()}
        return Measured(outcomes | parts, {"samples": len(pairs)})


WINOGROUND = TaskKind("winoground", Winoground)
