"""Features that were computed once, found again by what they depend on: in memory, and in safetensors files where a folder is given."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.evaluate.tasks.task import lines_sha256
from dsclip.files import sha256, write_whole

T = TypeVar("T")
MEMORY_BYTES = 1 << 30  # of features that are kept for a task on the same images
SUFFIX = ".features.safetensors"


class Ranks(Protocol):
    """The part of `Collectives` that is needed here."""

    @property
    def rank(self) -> int:
        """This process, from 0."""

    def broadcast_object(self, x: T) -> T:
        """Rank 0's object, on every rank."""


class FeatureCache:
    """Features by (model, images or texts). model: a hash of weights, precision and preprocessing, which all features depend on.

    folder: where files are kept, None for memory alone; most_bytes: what all files there may take, those used longest ago give way.
    Rank 0 alone looks at files: the others get what it read. Methods are collective. Implements `features.Store`.
    """

    def __init__(self, model: str, group: Ranks, folder: Path | None = None, most_bytes: int = 20 << 30):
        self._model, self._group, self._folder, self._most_bytes = model, group, folder, most_bytes
        self._kept: dict[str, Tensor] = {}  # the one used last at the end
        self.found = 0  # how often features were there

    def images(self, dataset: EvalDataset, indices: list[int], compute: Callable[[], Tensor]) -> Tensor:
        """See `Store`."""
        return self._get(lambda: self.key_of_images(dataset, indices), compute)

    def texts(self, texts: list[str], compute: Callable[[], Tensor]) -> Tensor:
        """See `Store`."""
        return self._get(lambda: self.key_of_texts(texts), compute)

    def key_of_images(self, dataset: EvalDataset, indices: list[int]) -> str:
        """Changes with the model, the image files and which of them are meant."""
        chosen = hashlib.sha256(np.asarray(indices, dtype="<i8").tobytes()).hexdigest()
        return self._key("images", dataset.fingerprint(), chosen)

    def key_of_texts(self, texts: list[str]) -> str:
        """Changes with the model and the texts."""
        return self._key("texts", lines_sha256(texts))

    def has(self, key: str) -> bool:
        """Whether the features are there; on rank 0 alone."""
        return key in self._kept or (self._folder is not None and self._path(key).is_file())

    def _key(self, *parts: str) -> str:
        return sha256("\n".join((self._model, *parts)).encode())

    def _get(self, make_key: Callable[[], str], compute: Callable[[], Tensor]) -> Tensor:
        first = self._group.rank == 0
        key = self._group.broadcast_object(make_key() if first else "")
        if key in self._kept:
            self.found += 1
            return self._keep(key, self._kept[key])
        stored = self._group.broadcast_object(self._read(key) if first else None)
        if stored is not None:
            self.found += 1
            return self._keep(key, stored)
        computed = self._keep(key, compute())
        if first and self._folder is not None:
            self._write(key, computed)
        return computed

    def _keep(self, key: str, features: Tensor) -> Tensor:
        self._kept.pop(key, None)
        self._kept[key] = features
        while len(self._kept) > 1 and sum(x.nbytes for x in self._kept.values()) > MEMORY_BYTES:
            del self._kept[next(iter(self._kept))]
        return features

    def _path(self, key: str) -> Path:
        return (self._folder or Path()) / (key + SUFFIX)

    def _read(self, key: str) -> Tensor | None:
        """What was written; None where nothing was, or it is damaged."""
        if self._folder is None or not self._path(key).is_file():
            return None
        try:
            with safe_open(str(self._path(key)), framework="pt") as file:
                features: Tensor = file.get_tensor("features").clone()
            os.utime(self._path(key))
            return features
        except (SafetensorError, OSError):
            return None

    def _write(self, key: str, features: Tensor) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = save({"features": features.contiguous()})
        _make_room(path.parent, self._most_bytes - len(content))
        if len(content) <= self._most_bytes:
            write_whole(path, content)


def _make_room(folder: Path, most_bytes: int) -> None:
    """Removes the files used longest ago until those that stay take no more than so many bytes."""
    files = []
    for path in folder.glob("*" + SUFFIX):
        with contextlib.suppress(FileNotFoundError):  # another evaluation made room as well
            found = path.stat()
            files.append((found.st_mtime, found.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size
