"""Whether an evaluation set is held out: scores on pairs that a model was trained on say nothing about others."""

from __future__ import annotations

import os

from dsclip.data.shards.specification import resolve_shards
from dsclip.data.sources.storage import LOCAL, Storage, is_remote
from dsclip.errors import UserError

ALL, PART = "training pairs", "partly training pairs"


def training_pairs(shards: str | list[str], train_shards: str | list[str], storage: Storage = LOCAL) -> str | None:
    """`training pairs` where all of these shards are training shards, `partly training pairs` where some are, or None.

    By the places of the shards: a copy elsewhere isn't recognised. Raises UserError when either can't be found.
    """
    trained = set(map(_place, resolve_shards(train_shards, storage)))
    seen = [_place(location) in trained for location in resolve_shards(shards, storage)]
    return ALL if all(seen) else PART if any(seen) else None


def trained_on(shards: list[str], train_shards: str | list[str] | None, storage: Storage) -> str | None:
    """As `training_pairs`; also None where there are no shards, or the training shards can't be found any more."""
    try:
        return training_pairs(shards, train_shards, storage) if train_shards and shards else None
    except UserError:
        return None


def data_name(shards: str | list[str], note: str | None) -> str:
    """How results name their data: `data/photos/val`, or `data/photos/train (training pairs)`."""
    name = shards if isinstance(shards, str) else "::".join(shards)
    return f"{name} ({note})" if note else name


def _place(location: str) -> str:
    return location if is_remote(location) else os.path.realpath(location)
