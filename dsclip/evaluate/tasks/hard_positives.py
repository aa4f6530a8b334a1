"""Are two captions that mean the same both nearer than a hard negative? SugarCrepe++ (Dumpala et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.evaluate.results.result import Measured, Outcomes, by_group
from dsclip.evaluate.tasks.captioned import Captioned
from dsclip.evaluate.tasks.hard_negatives import hard_negative_samples
from dsclip.evaluate.tasks.task import Embedded, Options, TaskKind


class HardPositives:
    """Shares of the samples with two captions or more and a hard negative; equal similarities lose.

    `image_text`: every caption is nearer to the image than every negative. `text_only`: any two captions are nearer to one
    another than any caption to any negative; no image takes part.
    """

    def __init__(self, dataset: EvalDataset, options: Options):
        self._groups = dataset.groups
        self._captioned = Captioned(dataset, hard_negative_samples(dataset, captions=2))
        self.images, self.texts = self._captioned.images, self._captioned.texts
        self.protocol = {"equal_similarities": "lose"}

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """{"image_text", "text_only", of parts, "samples"}."""
        similarity, whole = self._captioned.similarities(images, text)
        found: dict[str, list[bool]] = {"image_text": [], "text_only": []}
        for place in whole:
            start, middle, stop = self._captioned.spans[place]
            found["image_text"].append(bool(similarity[start:middle].min() > similarity[middle:stop].max()))
            found["text_only"].append(_text_only(text[start:middle], text[middle:stop]))
        units = torch.tensor([self._captioned.photos[place] for place in whole])
        groups = [self._groups[self._captioned.samples[place]] for place in whole]
        outcomes = {name: Outcomes(torch.tensor(hits).float(), units) for name, hits in found.items()}
        parts = {
            name: of for metric in list(outcomes) for name, of in by_group(metric, outcomes[metric], groups).items()
        }
        return Measured(outcomes | parts, {"samples": len(whole)})


HARD_POSITIVES = TaskKind("hard_positives", HardPositives)


def _text_only(captions: Tensor, negatives: Tensor) -> bool:
    # Products of single rows, as for images: a negative that equals a caption's twin has exactly its similarity.
    # Every caption is as near to itself as can be, so that it doesn't lower the smallest.
    among = (captions[:, None] * captions[None]).sum(dim=2)
    return bool(among.min() > (captions[:, None] * negatives[None]).sum(dim=2).max())
