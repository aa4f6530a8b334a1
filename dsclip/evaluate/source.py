"""A model that is to be evaluated, from wherever it comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsclip.checkpoint import read_checkpoint
from dsclip.convert.hf import open_hf_folder, training_data
from dsclip.convert.weights import Named
from dsclip.model import ClipConfig


@dataclass(frozen=True)
class Source:
    """A model whose weights are still on the disk. train_shards: None where its folder doesn't say."""

    config: ClipConfig
    weights: Callable[[], Named]
    tokenizer_dir: Path
    train_shards: str | list[str] | None


def open_model(path: Path) -> Source:
    """A checkpoint, the newest of a run, or a HuggingFace folder. Raises UserError for what is none of these."""
    if (path / "config.json").is_file():
        folder = open_hf_folder(path)
        return Source(folder.config, folder.weights, path, training_data(path))
    checkpoint = read_checkpoint(path)
    train_shards = checkpoint.recipe.get("data", {}).get("train_shards")
    return Source(checkpoint.config, checkpoint.state_dict.items, checkpoint.tokenizer_dir, train_shards)
