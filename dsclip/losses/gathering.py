"""What one evaluation of a loss compares: this rank's samples with those of all ranks, at once or one rank's at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsclip.errors import UserError
from dsclip.losses.blocks import blocks
from dsclip.losses.group import Group
from dsclip.losses.pairs import Pairs
from dsclip.losses.samples import Samples, widen

PairedLogits = Callable[[Samples, Samples], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Block:
    """Candidates of one rank or of several: images, texts, and hard negatives where the batch has any."""

    image: Samples
    text: Samples
    hard: Samples | None = None


class Gathered:
    """The samples of all ranks as every rank sees them. Collective.

    local: this rank's. blocks(): everyone's, as candidates. queue_image, queue_text: the same on all ranks. In a ring
    features pass by a rank at a time in each `blocks()`; keys, masks, owners and the numbers of a query (its logit with its
    partner, statistics), [N] each, are gathered whole either way.
    """

    def __init__(self, pairs: Pairs, group: Group, paired_logits: PairedLogits):
        """paired_logits(images, texts): [r], [r], each one's logit with its partner."""
        self._group, self._in_ring = group, group.in_ring and group.world_size > 1
        n, first = len(pairs.image), group.rank * len(pairs.image)
        self._travelling = [pairs.image, pairs.text]
        self._everyone = self._pairs_of_all(pairs, paired_logits)
        self.local = Block(*(x.part(first, first + n) for x in (self._everyone.image, self._everyone.text)))
        if self._in_ring:
            self.local = Block(
                _with_features(self.local.image, pairs.image), _with_features(self.local.text, pairs.text)
            )
        if pairs.hard_text is not None:
            self._gather_hard(pairs, pairs.hard_text, first)
        self.queue_image = self.queue_text = None
        if pairs.queue_image is not None and len(pairs.queue_image):
            if pairs.queue_text is None:
                raise UserError("queue_image is given without queue_text; a queue holds pairs")
            self.queue_image = Samples(pairs.queue_image, key=pairs.queue_keys)
            self.queue_text = Samples(pairs.queue_text, pairs.queue_text_valid, key=pairs.queue_keys)

    def __len__(self) -> int:
        """N."""
        return len(self._everyone.image)

    def _pairs_of_all(self, pairs: Pairs, paired_logits: PairedLogits) -> Block:
        """In a ring without features, [N, 0]."""
        gather = self._group.all_gather
        keys = None if pairs.keys is None else gather(pairs.keys)
        valid = [None if v is None else gather(v) for v in (pairs.image_valid, pairs.text_valid)]
        if self._in_ring:
            own = Samples(widen(pairs.image), pairs.image_valid), Samples(widen(pairs.text), pairs.text_valid)
            logits = [gather(x) for x in paired_logits(*own)]
            features = [logits[0].new_empty(len(logits[0]), 0)] * 2
        else:
            features = [widen(gather(x)) for x in (pairs.image, pairs.text)]
            logits = list(paired_logits(*(Samples(f, v) for f, v in zip(features, valid, strict=True))))
        rounded = [x.dtype == torch.bfloat16 for x in (pairs.image, pairs.text)]
        image, text = (
            Samples(f, v, 0, keys, None, p, is_bf16=r)
            for f, v, p, r in zip(features, valid, logits, rounded, strict=True)
        )
        return Block(image, text)

    def _gather_hard(self, pairs: Pairs, hard_text: Tensor, first: int) -> None:
        if pairs.hard_owner is None:
            raise UserError("hard_text is given without hard_owner, the rows whose hard negatives they are")
        group, owner = self._group, pairs.hard_owner + first
        rounded = hard_text.dtype == torch.bfloat16
        hard = Samples(widen(hard_text), pairs.hard_valid, owner=owner, is_bf16=rounded)
        self.local = replace(self.local, hard=hard)
        counts = [len(hard_text)]
        if group.world_size > 1:
            counts = group.all_gather(torch.tensor(counts, device=hard_text.device)).tolist()
        self._hard_counts = counts
        valid = None if pairs.hard_valid is None else _gather_ragged(pairs.hard_valid, counts, group)
        owners = _gather_ragged(owner, counts, group)
        if self._in_ring:
            self._travelling.append(_padded(hard_text, max(counts)))
            features = self.local.image.features.new_empty(sum(counts), 0)
        else:
            features = widen(_gather_ragged(hard_text, counts, group))
        self._everyone = replace(self._everyone, hard=Samples(features, valid, owner=owners, is_bf16=rounded))

    def add_statistics(self, image: dict[str, Tensor], text: dict[str, Tensor]) -> None:
        """What the gradient needs of this rank's queries, [n] a name, and by one all-gather of all ranks'. Collective."""
        names = list(image)
        all_image, all_text = image, text
        if names and self._group.world_size > 1:
            gathered = self._group.all_gather(torch.stack([*image.values(), *text.values()], dim=1)).unbind(1)
            all_image = dict(zip(names, gathered[: len(names)], strict=True))
            all_text = dict(zip(names, gathered[len(names) :], strict=True))
        self.local = _with_statistics(self.local, image, text)
        self._everyone = _with_statistics(self._everyone, all_image, all_text)

    def blocks(self) -> Iterator[Block]:
        """The candidates, in one block or in a ring's. Collective: iterate to the end, and keep no features of a block."""
        if not self._in_ring:
            yield self._everyone
            return
        n = len(self._travelling[0])
        for rank, (image, text, *hard) in blocks(self._travelling, self._group):
            yield Block(
                _with_features(self._everyone.image.part(rank * n, (rank + 1) * n), image),
                _with_features(self._everyone.text.part(rank * n, (rank + 1) * n), text),
                self._hard_of(rank, hard[0]) if hard else None,
            )

    def _hard_of(self, rank: int, padded: Tensor) -> Samples | None:
        start, count = sum(self._hard_counts[:rank]), self._hard_counts[rank]
        if self._everyone.hard is None:
            return None
        return _with_features(self._everyone.hard.part(start, start + count), padded[:count])


def _with_features(samples: Samples, features: Tensor) -> Samples:
    return replace(samples, features=widen(features))


def _with_statistics(block: Block, image: dict[str, Tensor], text: dict[str, Tensor]) -> Block:
    return replace(block, image=block.image.with_statistics(image), text=block.text.with_statistics(text))


def _padded(x: Tensor, length: int) -> Tensor:
    if len(x) == length:
        return x
    padded = x.new_zeros((length, *x.shape[1:]))
    padded[: len(x)] = x
    return padded


def _gather_ragged(x: Tensor, counts: list[int], group: Group) -> Tensor:
    """x [m, ...] of all ranks in rank order, where m differs between ranks: counts."""
    if group.world_size == 1:
        return x
    most = max(counts)
    parts = group.all_gather(_padded(x, most)).split(most) if most else [x] * len(counts)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
