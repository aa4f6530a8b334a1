"""Weighted sums of the weights of models with one architecture, computed a tensor at a time."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsclip.checkpoint import Checkpoint
from dsclip.convert.source import open_source
from dsclip.convert.whole import whole_model
from dsclip.data import load_tokenizer
from dsclip.engine.consolidate import ShardedWeights
from dsclip.errors import UserError
from dsclip.model import ClipConfig
from dsclip.model.config import OF_THE_RUN


@contextmanager
def opened(paths: Sequence[str]) -> Iterator[list[Checkpoint]]:
    """The models at these paths, whatever `open_source` reads; a HuggingFace model's tokenizer is there while this lasts."""
    with tempfile.TemporaryDirectory(prefix="dsclip-tokenizer-") as folder:
        yield [whole_model(open_source(path), Path(folder) / str(i)) for i, path in enumerate(paths)]


def combine(models: Sequence[Checkpoint], shares: Sequence[float]) -> Checkpoint:
    """The model whose weights, log logit scale and sigmoid bias are the sums of those of the models, each times its share.

    Tensors are summed in float64, one when it is asked for. Tokenizer and configuration are those of the first, the training
    data are those of all. Raises UserError for models that differ in more than their weights.
    """
    first = models[0]
    for other in models[1:]:
        check_alike(first, other)
    shards = dict.fromkeys(name for model in models for name in _train_shards(model))
    biases = [model.logit_bias for model in models]
    return replace(
        first,
        state_dict=ShardedWeights({name: partial(_sum, name, models, shares) for name in first.state_dict}),
        logit_scale=math.exp(sum(s * math.log(m.logit_scale) for s, m in zip(shares, models, strict=True))),
        logit_bias=None
        if biases[0] is None
        else sum(s * b for s, b in zip(shares, biases, strict=True) if b is not None),
        step=0,
        samples=0,
        recipe={"data": {"train_shards": list(shards)}} if shards else {},
    )


def check_shares(shares: Sequence[float], count: int, what: str) -> None:
    """Raises UserError unless there is a finite share for each of so many."""
    if len(shares) != count:
        raise UserError(f"--shares has {len(shares)} numbers for {count} {what}")
    if not all(math.isfinite(share) for share in shares):
        raise UserError(f"--shares {' '.join(map(str, shares))}: every share must be a finite number")


def check_alike(one: Checkpoint, other: Checkpoint) -> None:
    """Raises UserError, with what differs by name, for models whose weights can't be added."""
    names = [f.name for f in fields(ClipConfig) if f.name not in OF_THE_RUN]
    differ = [name for name in names if getattr(one.config, name) != getattr(other.config, name)]
    if differ:
        shown = ", ".join(f"{name} {getattr(one.config, name)} and {getattr(other.config, name)}" for name in differ)
        raise UserError(f"{one.path} and {other.path} are different models: {shown}")
    if (one.logit_bias is None) != (other.logit_bias is None):
        raise UserError(f"one of {one.path} and {other.path} has the bias of a sigmoid loss, and the other none")
    if load_tokenizer(str(one.tokenizer_dir)).sha256() != load_tokenizer(str(other.tokenizer_dir)).sha256():
        raise UserError(
            f"{one.path} and {other.path} have different tokenizers: the same token is another word in each"
        )


def _train_shards(model: Checkpoint) -> list[str]:
    shards = model.recipe.get("data", {}).get("train_shards") or []
    return [shards] if isinstance(shards, str) else list(shards)


def _sum(name: str, models: Sequence[Checkpoint], shares: Sequence[float]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for model, share in zip(models, shares, strict=True):
        total = total + share * model.state_dict[name].double()
    return total.float()
