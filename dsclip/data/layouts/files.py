"""The files of a folder or of a zip, by name; a zip is read in place, and nothing is ever extracted to a path it names."""

from __future__ import annotations

import os
import zipfile
from functools import cached_property
from pathlib import Path

from dsclip.errors import UserError


class FileSet:
    """names: relative, with `/`, sorted; hidden files are none of them. Several threads may read at once.

    within: only the files of this subfolder, where `path` is a folder.
    """

    def __init__(self, path: Path, within: str = ""):
        self.path = path
        self._zip = None
        if path.is_dir():
            names = _walk(str(path), within and within + "/")
        elif zipfile.is_zipfile(path):
            self._zip = zipfile.ZipFile(path)
            names = [n for n in self._zip.namelist() if not (n.endswith("/") or _hidden(n))]
        else:
            raise UserError(f"{path} is neither a folder nor a zip file")
        self.names = sorted(names)

    def read(self, name: str) -> bytes:
        """Raises OSError, and what zipfile raises for a damaged archive."""
        if self._zip:
            return self._zip.read(name)
        with open(os.path.join(self.path, name), "rb") as file:
            return file.read()

    def root(self) -> str:
        """What the names are relative to."""
        return str(self.path)

    def state(self, names: list[str]) -> list[object]:
        """Changes with the files of these names: place, size and time of change of each, or of the zip."""
        if self._zip:
            return [file_state(str(self.path))]
        return [file_state(os.path.join(self.path, name)) for name in names]

    def lines(self, name: str) -> list[str]:
        """As `text_lines`."""
        return text_lines(self.read(name), f"{self.path}/{name}")

    @cached_property
    def present(self) -> frozenset[str]:
        """The names, to look one up."""
        return frozenset(self.names)


def file_state(path: str) -> tuple[str, int, int]:
    """(place, size, time of change) of a file, whose size is −1 where it isn't there."""
    try:
        found = os.stat(path)
    except OSError:
        return path, -1, 0
    return os.path.realpath(path), found.st_size, found.st_mtime_ns


def text_lines(content: bytes, path: str) -> list[str]:
    """The lines of a text that are not empty. Raises UserError where it isn't UTF-8."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _walk(folder: str, start: str) -> list[str]:
    """All files below, with scandir alone: pathlib takes seconds for the 50,000 images of a test set."""
    names, waiting = [], [start]
    while waiting:
        within = waiting.pop()
        with os.scandir(os.path.join(folder, within)) as entries:
            for entry in entries:
                if entry.name.startswith((".", "__MACOSX")):
                    continue
                if entry.is_dir():
                    waiting.append(f"{within}{entry.name}/")
                elif entry.is_file():
                    names.append(within + entry.name)
    return names


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
