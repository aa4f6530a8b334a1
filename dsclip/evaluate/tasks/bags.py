"""Retrieval within bags of similar images, where a caption must tell details: TrueMatch's measure, on sets whose samples have groups.

Source: Gaur et al. 2024 (No Detail Left Behind), section on TrueMatch: recall@1 within a bag, by the bags' size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.errors import UserError
from dsclip.evaluate.results.result import Measured, Outcomes, by_group
from dsclip.evaluate.tasks.retrieval import measure_retrieval
from dsclip.evaluate.tasks.task import Embedded, Images, Options, TaskKind

METRICS = ("text_to_image_recall@1", "image_to_text_recall@1")


class BagRetrieval:
    """Recall@1 both ways, as in retrieval, but among the images and captions of a sample's own group; groups of one don't take part."""

    def __init__(self, dataset: EvalDataset, options: Options):
        captioned = [i for i, captions in enumerate(dataset.captions) if captions and dataset.groups[i] is not None]
        sizes = Counter(dataset.groups[i] for i in captioned)
        self._indices = [i for i in captioned if sizes[dataset.groups[i]] > 1]
        if not self._indices:
            raise UserError(
                "retrieval within bags needs captions and two samples or more of the same group: name their key in .json with --group-key"
            )
        self._groups = dataset.groups
        self._owner = [i for i in self._indices for _ in dataset.captions[i]]
        self.images = (Images(dataset, self._indices),)
        self.texts = [caption for i in self._indices for caption in dataset.captions[i]]
        self.protocol = {
            "equal_similarities": "lower index first",
            "bags": len({dataset.groups[i] for i in self._indices}),
        }

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """{METRICS, and of bags of each size where there are several, "images", "captions", "bags", "chance"}: what guessing an image would find."""
        image, decoded = images[0]
        bags: dict[str | None, list[int]] = {}
        for row, i in enumerate(decoded):
            bags.setdefault(self._groups[i], []).append(row)
        columns: dict[int, list[int]] = {}
        for column, i in enumerate(self._owner):
            columns.setdefault(i, []).append(column)
        values: dict[str, list[Tensor]] = {name: [] for name in METRICS}
        units: dict[str, list[Tensor]] = {name: [] for name in METRICS}
        sizes: dict[str, list[str | None]] = {name: [] for name in METRICS}
        whole = [rows for rows in bags.values() if len(rows) > 1]
        if not whole:
            raise UserError("no bag has two images that can be decoded")
        for rows in whole:
            captions = [columns[decoded[row]] for row in rows]
            owner = torch.repeat_interleave(torch.tensor([len(of_image) for of_image in captions]))
            found = measure_retrieval(image[rows], text[[c for of_image in captions for c in of_image]], owner).outcomes
            for name in METRICS:
                values[name].append(found[name].values)
                units[name].append(torch.tensor(rows)[found[name].units])
                sizes[name] += [f"bags_of_{len(rows)}"] * len(found[name].values)
        outcomes = {name: Outcomes(torch.cat(values[name]), torch.cat(units[name])) for name in METRICS}
        for name in METRICS:
            outcomes |= by_group(name, outcomes[name], sizes[name])
        guessed = [1 / int(str(size).rpartition("_")[2]) for size in sizes[METRICS[0]]]
        counts: dict[str, int | float] = {
            "images": sum(map(len, whole)), "captions": len(guessed), "bags": len(whole), "chance": sum(guessed) / len(guessed)
        }  # fmt: skip
        return Measured(outcomes, counts).of_samples(decoded)


BAG_RETRIEVAL = TaskKind("bag_retrieval", BagRetrieval)
