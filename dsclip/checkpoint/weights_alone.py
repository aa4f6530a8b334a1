"""Checkpoints that hold weights and no state of a training: conversion writes them, and a run begins from them with `model.init`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dsclip.checkpoint.manifest import Manifest
from dsclip.errors import UserError

WEIGHTS = "weights.safetensors"  # float32, by dsclip's names


def mapped_weights(folder: Path) -> Mapping[str, Tensor]:
    """The weights of such a checkpoint, which are in memory when they are used. Raises UserError when the file is damaged."""
    try:
        weights: dict[str, Tensor] = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged ({error})") from error
    return weights


def check_continuable(manifest: Manifest, path: Path) -> None:
    """Raises UserError for a checkpoint that no training can go on from."""
    if WEIGHTS in manifest["files"]:
        raise UserError(
            f"{path} holds weights alone, and no run to continue; begin one from them with model.init={path}"
        )
