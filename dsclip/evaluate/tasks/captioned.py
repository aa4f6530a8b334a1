"""Images with captions and hard negatives of their own, as several tasks need them embedded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.evaluate.tasks.task import Embedded, Images


class Captioned:
    """Samples of a set, each image embedded once. texts: captions, then negatives, sample by sample.

    spans: for each sample where its captions begin, its negatives begin, and both end among the texts.
    """

    def __init__(self, dataset: EvalDataset, samples: list[int]):
        self.samples = samples
        first = dataset.same_images()
        self._image_of = [first[i] for i in samples]
        photos = dataset.same_images(in_any_box=True)
        self.photos = [photos[i] for i in samples]  # what is drawn together in a bootstrap
        self.images = (Images(dataset, sorted(set(self._image_of))),)
        self.texts = [t for i in samples for t in (*dataset.captions[i], *dataset.negatives[i])]
        self.spans: list[tuple[int, int, int]] = []
        start = 0
        for i in samples:
            middle = start + len(dataset.captions[i])
            stop = middle + len(dataset.negatives[i])
            self.spans.append((start, middle, stop))
            start = stop

    def similarities(self, images: Sequence[Embedded], text: Tensor) -> tuple[Tensor, list[int]]:
        """([m] of each text to its sample's image, places in `samples` of those whose image could be decoded)."""
        features, decoded = images[0]
        row_of = {index: row for row, index in enumerate(decoded)}
        rows = torch.tensor([row_of.get(image, -1) for image in self._image_of])
        of_text = torch.repeat_interleave(torch.tensor([stop - start for start, _, stop in self.spans]))
        # Row by row, not as a matrix product: equal captions have equal similarities whatever stands beside them.
        return (text * features[rows[of_text]]).sum(dim=1), (rows >= 0).nonzero().flatten().tolist()
