"""One side of a similarity matrix: features with what masks and gradients must know of each sample.

Rows ask, columns are candidates; the same sample is a row in one direction and a column in the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsclip.losses.group import Group
from dsclip.losses.pairs import Pairs


@dataclass(frozen=True)
class Side:
    """r samples. features [r, d] or tokens [r, T, d] with valid [r, T].

    first: index of the first sample in the global batch; None for samples that are no part of it (queue, hard
    negatives). key [r]. owner [r]: hard negatives only, the global index of the image they belong to. own [r]: logit of
    the sample with its own partner. stats: what the sample's own softmax (or weights) needs, one tensor [r] a name.
    """

    features: Tensor
    valid: Tensor | None = None
    first: int | None = None
    key: Tensor | None = None
    owner: Tensor | None = None
    own: Tensor | None = None
    stats: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.features)

    def part(self, start: int, stop: int) -> Side:
        """Samples start to stop."""

        def cut(x):
            return None if x is None else x[start:stop]

        return Side(
            self.features[start:stop],
            cut(self.valid),
            None if self.first is None else self.first + start,
            cut(self.key),
            cut(self.owner),
            cut(self.own),
            None if self.stats is None else {k: cut(v) for k, v in self.stats.items()},
        )

    def with_stats(self, stats: dict[str, Tensor]) -> Side:
        """The same samples, which now can ask."""
        return replace(self, stats=stats)


@dataclass(frozen=True)
class Sides:
    """Everything one evaluation of a loss compares: this rank's part and, where gathered, all ranks'."""

    image: Side
    text: Side
    all_image: Side
    all_text: Side
    hard: Side | None
    all_hard: Side | None
    queue_image: Side | None
    queue_text: Side | None


def gather_sides(pairs: Pairs, group: Group, own_logits) -> Sides:
    """One all-gather a kind of feature. own_logits(image side, text side): [N], [N], the pairs' own logits."""
    n, first = len(pairs.image), group.rank * len(pairs.image)
    keys = None if pairs.keys is None else group.all_gather(pairs.keys)
    valid = [None if v is None else group.all_gather(v) for v in (pairs.image_valid, pairs.text_valid)]
    all_image = Side(widen(group.all_gather(pairs.image)), valid[0], 0, keys)
    all_text = Side(widen(group.all_gather(pairs.text)), valid[1], 0, keys)
    image_own, text_own = own_logits(all_image, all_text)
    all_image, all_text = replace(all_image, own=image_own), replace(all_text, own=text_own)
    hard = all_hard = None
    if pairs.hard_text is not None:
        hard = Side(widen(pairs.hard_text), pairs.hard_valid, owner=pairs.hard_owner + first)
        hard_valid = None if hard.valid is None else gather_ragged(hard.valid, group)
        all_hard = Side(
            widen(gather_ragged(pairs.hard_text, group)), hard_valid, owner=gather_ragged(hard.owner, group)
        )
    queue_image = queue_text = None
    if pairs.queue_image is not None and len(pairs.queue_image):
        queue_image = Side(pairs.queue_image, key=pairs.queue_keys)
        queue_text = Side(pairs.queue_text, pairs.queue_text_valid, key=pairs.queue_keys)
    mine = (first, first + n)
    return Sides(
        all_image.part(*mine), all_text.part(*mine), all_image, all_text, hard, all_hard, queue_image, queue_text
    )


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
