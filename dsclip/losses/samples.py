"""Samples as queries or candidates of a similarity: features with what masks and gradients must know of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsclip.errors import UserError
from dsclip.losses.group import Group
from dsclip.losses.pairs import Pairs


@dataclass(frozen=True)
class Samples:
    """r samples. features [r, D], or tokens [r, T, D] with valid [r, T].

    first: index of the first sample in the global batch; None for samples that are no part of it (queue, hard
    negatives). key [r]. owner [r]: hard negatives only, the global index of the image they belong to. positive_logit
    [r]: the logit of the sample with its partner. statistics: what the gradient of its own loss needs, when it is a
    query, one tensor [r] a name.
    """

    features: Tensor
    valid: Tensor | None = None
    first: int | None = None
    key: Tensor | None = None
    owner: Tensor | None = None
    positive_logit: Tensor | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    def part(self, start: int, stop: int) -> Samples:
        """Samples start to stop."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[start:stop]

        return Samples(
            self.features[start:stop],
            cut(self.valid),
            None if self.first is None else self.first + start,
            cut(self.key),
            cut(self.owner),
            cut(self.positive_logit),
            {name: x[start:stop] for name, x in self.statistics.items()},
        )

    def with_statistics(self, statistics: dict[str, Tensor]) -> Samples:
        """The same samples, of which the gradient as queries can be computed."""
        return replace(self, statistics=statistics)


@dataclass(frozen=True)
class GatheredSamples:
    """Everything one evaluation of a loss compares: this rank's samples and all ranks'; the queue is the same on all."""

    local_image: Samples
    local_text: Samples
    all_image: Samples
    all_text: Samples
    local_hard: Samples | None
    all_hard: Samples | None
    queue_image: Samples | None
    queue_text: Samples | None


def gather_samples(
    pairs: Pairs, group: Group, paired_logits: Callable[[Samples, Samples], tuple[Tensor, Tensor]]
) -> GatheredSamples:
    """One all-gather a kind of feature. paired_logits(images, texts): [N], [N], each one's logit with its partner."""
    n, first = len(pairs.image), group.rank * len(pairs.image)
    keys = None if pairs.keys is None else group.all_gather(pairs.keys)
    image_valid, text_valid = (
        None if v is None else group.all_gather(v) for v in (pairs.image_valid, pairs.text_valid)
    )
    all_image = Samples(widen(group.all_gather(pairs.image)), image_valid, 0, keys)
    all_text = Samples(widen(group.all_gather(pairs.text)), text_valid, 0, keys)
    image_logit, text_logit = paired_logits(all_image, all_text)
    all_image, all_text = replace(all_image, positive_logit=image_logit), replace(all_text, positive_logit=text_logit)
    local_hard = all_hard = None
    if pairs.hard_text is not None:
        if pairs.hard_owner is None:
            raise UserError("hard_text is given without hard_owner, the rows whose hard negatives they are")
        owner = pairs.hard_owner + first
        local_hard = Samples(widen(pairs.hard_text), pairs.hard_valid, owner=owner)
        hard_valid = None if pairs.hard_valid is None else gather_ragged(pairs.hard_valid, group)
        all_hard = Samples(widen(gather_ragged(pairs.hard_text, group)), hard_valid, owner=gather_ragged(owner, group))
    queue_image = queue_text = None
    if pairs.queue_image is not None and len(pairs.queue_image):
        if pairs.queue_text is None:
            raise UserError("queue_image is given without queue_text; a queue holds pairs")
        queue_image = Samples(pairs.queue_image, key=pairs.queue_keys)
        queue_text = Samples(pairs.queue_text, pairs.queue_text_valid, key=pairs.queue_keys)
    local_image, local_text = all_image.part(first, first + n), all_text.part(first, first + n)
    return GatheredSamples(local_image, local_text, all_image, all_text, local_hard, all_hard, queue_image, queue_text)


def widen(x: Tensor) -> Tensor:
    """Features in float32 or wider: half-precision ones travel as they are and are computed with in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gather_ragged(x: Tensor, group: Group) -> Tensor:
    """x [m, ...] of all ranks in rank order, where m differs between ranks."""
    if group.world_size == 1:
        return x
    counts = group.all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    parts = group.all_gather(padded).split(max(counts)) if max(counts) else [padded] * len(counts)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
