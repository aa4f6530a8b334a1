"""The tokenizer's files that go with every checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class SavedTokenizer(Protocol):
    """The tokenizer that goes with a checkpoint."""

    def save(self, folder: Path) -> None:
        """Writes its files into the folder."""


class TokenizerFiles:
    """The files are the same each time, and making them takes longer than writing them: the tokenizer makes them once."""

    def __init__(self, tokenizer: SavedTokenizer):
        self._tokenizer = tokenizer
        self._made: dict[Path, bytes] | None = None

    def save(self, folder: Path) -> None:
        """Writes them into a folder that isn't there."""
        if self._made is None:
            self._tokenizer.save(folder)
            self._made = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            return
        folder.mkdir()
        for name, content in self._made.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
