"""A teacher's features of every sample, written into the shards: no teacher then runs beside the student.

After Vasu et al. 2024, "MobileCLIP", section 4 (dataset reinforcement). The teacher looks at the very crops and captions that training
will show, pass by pass: what is stored is what a teacher beside the student would say.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsclip.config.data_section import DataSection
from dsclip.data.decoding.augment import augment
from dsclip.data.decoding.prepare import Preparer
from dsclip.data.decoding.sample import MEMBER_EXTENSIONS, TEACHER, BadSample, RawSample
from dsclip.data.shards.shard_set import ShardSet
from dsclip.data.sources.storage import Storage
from dsclip.datasets.rewrite import WholeSample, whole_samples
from dsclip.errors import UserError
from dsclip.train.teacher import Teacher


class _Shown(NamedTuple):
    """What training shows of a sample in a pass. augmentation: see `augment`."""

    image: Tensor
    caption: str
    augmentation: tuple[float, ...] | None


@dataclass
class Reinforcement:
    """Gives samples with the teacher's features in them. unusable: how many have none, since training can't use them, by reason."""

    teacher: Teacher
    passes: int
    image_size: int
    samples_at_once: int
    unusable: Counter[str] = field(default_factory=Counter, init=False)

    def check(self, data: DataSection, seed: int, shards: ShardSet, storage: Storage) -> None:
        """Raises UserError when training can use no sample at all; the first that it can use ends the search."""
        prepare = Preparer(data, self.image_size, seed, hard_negatives=False)
        if not any(self._shown(prepare, sample, shards) for sample in whole_samples(shards, storage)):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.unusable.most_common())
            raise UserError(
                f"training can use none of the {self.unusable.total()} samples ({reasons}), so there is nothing to write; see what is wrong "
                "with tools/check_data.py"
            )
        self.unusable.clear()

    def samples(self, data: DataSection, seed: int, shards: ShardSet, storage: Storage) -> Iterator[WholeSample]:
        """All samples of the shards, in order, with a member of float32 [passes, 2, D]: of the image and of the caption of each pass."""
        prepare = Preparer(data, self.image_size, seed, hard_negatives=False)
        whole = whole_samples(shards, storage)
        while samples := list(islice(whole, self.samples_at_once)):
            shown = [self._shown(prepare, sample, shards) for sample in samples]
            features = iter(self._features([each for of_sample in shown for each in of_sample]).split(self.passes))
            for sample, of_sample in zip(samples, shown, strict=True):
                members = {name: x for name, x in sample.members.items() if name != TEACHER}
                if of_sample:
                    stream = io.BytesIO()
                    np.save(stream, next(features).numpy(), allow_pickle=False)
                    members[TEACHER] = stream.getvalue()
                yield sample._replace(members=members)

    def _shown(self, prepare: Preparer, sample: WholeSample, shards: ShardSet) -> list[_Shown]:
        """In each pass; nothing of a sample that training leaves out."""
        read = {name: x for name, x in sample.members.items() if name in MEMBER_EXTENSIONS}
        raw, shown = RawSample(shards.identity(sample.shard), sample.key, read), []
        for number in range(self.passes):
            image = torch.empty(3, self.image_size, self.image_size, dtype=torch.uint8)
            try:
                made = prepare(raw, number, image)
            except BadSample as error:
                self.unusable[str(error)] += 1
                return []
            shown.append(_Shown(image, made.caption, made.augmentation))
        return shown

    def _features(self, shown: list[_Shown]) -> Tensor:
        """[m, 2, D] of m images and their captions."""
        if not shown:
            return torch.empty(0, 2, 0)
        images = torch.stack([each.image for each in shown])
        if shown[0].augmentation is not None:
            images = augment(images, torch.tensor([each.augmentation for each in shown]))
        return torch.stack(self.teacher.features(images, [each.caption for each in shown]), 1).cpu()
