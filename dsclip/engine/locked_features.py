"""Features of a tower that is locked as a whole, computed once for each input and kept in host memory (LiT, Zhai et al. 2022, appendix).

A caption is known by its tokens. An image is known by its sample's id, since its pixels are the same in every epoch: recipes that
draw crops, flips or colours are refused. The weights of the tower are those of the run, so no other run's features can be among them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dsclip.config.schema import Recipe
from dsclip.distributed import Collectives
from dsclip.engine.micro_batch import MicroBatch
from dsclip.errors import UserError
from dsclip.model import ClipConfig

Encode = Callable[[Tensor], Tensor]  # images [b, 3, S, S] or tokens [b, L] -> features [b, D]; collective under ZeRO-3


def locked_features(
    recipe: Recipe,
    config: ClipConfig,
    group: Collectives,
    encode: dict[str, Callable[..., Tensor]],
) -> LockedFeatures | None:
    """What `model.lock_once` asks for, or None. encode: by tower, takes inputs and chunk_size. Raises UserError for images of
    which patches are dropped."""
    section = recipe.model
    if not section.lock_once:
        return None
    if section.lock == "image" and config.patch_dropout:
        raise UserError(
            "model.lock_once with model.lock=image needs model.patch_dropout 0: features of other patches are others"
        )
    return LockedFeatures(section.lock, group, partial(encode[section.lock], chunk_size=recipe.batch.chunk_size))


class LockedFeatures:
    """Every rank keeps the features of all ranks' inputs, 4·D bytes each: in the next epoch a sample is another rank's."""

    def __init__(self, tower: str, group: Collectives, encode: Encode):
        """tower: `image` or `text`."""
        self._images, self._group, self._encode = tower == "image", group, encode
        self._rows: dict[Hashable, int] = {}
        self._table = torch.empty(0, 0)

    def __len__(self) -> int:
        return len(self._rows)

    def known(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with the tower's features; what is new is computed first. Collective."""
        keys = [self._keys(m) for m in micro_batches]
        places = {key: i for i, key in enumerate(key for part in keys for key in part)}
        new = [key for key in places if key not in self._rows]
        # Ranks encode equally often and equally much, or those of ZeRO-3 would wait for each other forever.
        most = max(self._group.all_gather_object(len(new)))
        if most:
            inputs = torch.cat([m.images if self._images else m.tokens for m in micro_batches])
            chosen = [places[key] for key in new] + [0] * (most - len(new))
            size = len(micro_batches[0].images)
            features = torch.cat([self._encode(part) for part in inputs[chosen].split(size)])[: len(new)]
            for theirs, found in self._group.all_gather_object((new, features.float().cpu())):
                self._add(theirs, found)
        return [self._with_features(m, part) for m, part in zip(micro_batches, keys, strict=True)]

    def _keys(self, micro_batch: MicroBatch) -> list[Hashable]:
        if self._images:
            return list[Hashable](micro_batch.ids.tolist())
        return [row.tobytes() for row in micro_batch.tokens.numpy()]

    def _add(self, keys: list[Hashable], features: Tensor) -> None:
        fresh = [i for i, key in enumerate(keys) if key not in self._rows]
        needed = len(self._rows) + len(fresh)
        if needed > len(self._table):  # doubled, so that each feature is copied a few times at most
            table = torch.empty(max(needed, 2 * len(self._table)), features.shape[1])
            if self._rows:
                table[: len(self._rows)] = self._table[: len(self._rows)]
            self._table = table
        for i in fresh:
            self._table[len(self._rows)] = features[i]
            self._rows[keys[i]] = len(self._rows)

    def _with_features(self, micro_batch: MicroBatch, keys: list[Hashable]) -> MicroBatch:
        found = self._table[[self._rows[key] for key in keys]].to(micro_batch.images.device)
        if self._images:
            return replace(micro_batch, image_features=found)
        return replace(micro_batch, text_features=found)
