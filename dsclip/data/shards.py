"""Shard sets: webdataset tar files with a manifest beside them; how they are named, written and found."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import tarfile
from pathlib import Path

import braceexpand

from dsclip.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "dsclip-shards-1"
MAX_SHARDS = 2_000_000  # a brace expression can name more files than memory holds


def resolve_shards(spec: str | list[str]) -> list[Path]:
    """The shard files that `spec` names, sorted within each part.

    spec: a folder, a glob, a brace expression (`data/{00000..00099}.tar`), several joined by `::`, a list of these, or
    `demo` and `demo:val` for the embedded data set. Raises UserError that names what can't be found.
    """
    parts = [p for s in ([spec] if isinstance(spec, str) else spec) for p in s.split("::")]
    shards = [path for part in parts for path in _resolve_part(part.strip())]
    if not shards:
        raise UserError("no shards are named; set data.train_shards to a folder, a glob or a brace expression")
    return shards


def _resolve_part(part: str) -> list[Path]:
    if part in ("demo", "demo:train", "demo:val"):
        from dsclip.data.demo import demo_folder

        return _resolve_part(str(demo_folder() / ("val" if part == "demo:val" else "train")))
    if re.match(r"[a-z0-9+]+:", part, re.IGNORECASE):
        raise UserError(f"{part}: only local shards can be read; pipes and remote addresses are not opened")
    if "{" in part:
        return [_existing(p) for p in _expand(part)]
    if os.path.isdir(part):
        found = sorted(Path(part).glob("*.tar"))
        if not found:
            raise UserError(f"{part} holds no .tar shards; write some with tools/make_shards.py")
        return found
    if any(c in part for c in "*?["):
        found = sorted(Path(p) for p in glob.glob(part))
        if not found:
            raise UserError(f"no file matches {part}")
        return found
    return [_existing(part)]


def _existing(path: str) -> Path:
    if not os.path.isfile(path):
        raise UserError(f"shard {path} does not exist")
    return Path(path)


def _expand(part: str) -> list[str]:
    count = 1
    for low, high in re.findall(r"\{(-?\d+)\.\.(-?\d+)", part):
        count *= abs(int(high) - int(low)) + 1
    if count > MAX_SHARDS:
        raise UserError(f"{part} names {count:,} shards; {MAX_SHARDS:,} are the most that make sense")
    try:
        return list(braceexpand.braceexpand(part))
    except ValueError as error:
        raise UserError(f"{part} is no valid brace expression ({error})") from error


def read_manifest(shards: list[Path]) -> dict | None:
    """The manifest beside the first shard, or None."""
    path = shards[0].parent / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {manifest['format']!r}; this version of dsclip reads {FORMAT!r}")
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); write the shards again") from error


class ShardWriter:
    """Writes samples into numbered tar shards of a folder, byte for byte the same for the same samples.

    Use as a context manager: leaving it without an error writes the manifest, which makes the set complete.
    """

    def __init__(
        self, folder: Path, shard_size: int, *, classes: list[str] | None = None, templates: list[str] | None = None
    ):
        self.folder, self._shard_size = Path(folder), shard_size
        self._classes, self._templates = classes, templates
        self._entries: list[dict] = []
        self._tar: tarfile.TarFile | None = None
        self._in_shard = 0

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """One sample: members by extension, such as {"jpg": ..., "txt": ...}."""
        if self._tar is None:
            name = f"{len(self._entries):05d}.tar"
            self._tar = tarfile.open(self.folder / (name + ".tmp"), "w", format=tarfile.USTAR_FORMAT)
            self._entries.append({"name": name})
        for extension, content in sorted(members.items()):
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(content), 0o644
            self._tar.addfile(info, io.BytesIO(content))
        self._in_shard += 1
        if self._in_shard == self._shard_size:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        entry = self._entries[-1]
        temporary, final = self.folder / (entry["name"] + ".tmp"), self.folder / entry["name"]
        content = temporary.read_bytes()
        entry |= {"samples": self._in_shard, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        os.replace(temporary, final)
        self._tar, self._in_shard = None, 0

    def __exit__(self, error_type, error, trace) -> None:
        if error_type is not None:
            if self._tar is not None:
                self._tar.close()
            return
        self._finish_shard()
        manifest = {
            "format": FORMAT,
            "samples": sum(e["samples"] for e in self._entries),
            "shards": self._entries,
            "classes": self._classes,
            "templates": self._templates,
        }
        temporary = self.folder / (MANIFEST + ".tmp")
        temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / MANIFEST)
