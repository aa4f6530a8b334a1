"""Shards written again with some of their samples changed, in the same order, so that training draws the same batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dsclip.data.reading.open_shards import OpenShards
from dsclip.data.shards.index_file import SUFFIX
from dsclip.data.shards.manifest import MANIFEST, Labels, read_manifest
from dsclip.data.shards.shard_set import ShardSet
from dsclip.data.shards.tar_index import DamagedTar, locate_members, reader_of
from dsclip.data.shards.writer import ShardWriter
from dsclip.data.sources.storage import SourceError, Storage
from dsclip.errors import UserError
from dsclip.files import sha256

Members = dict[str, bytes]  # of a sample, by extension
Change = Callable[[str, Members], Members | None]  # (key, members) to those to write, None: the sample is left out


class WholeSample(NamedTuple):
    """A sample with all members, also those that training doesn't read. shard: its number in the set."""

    shard: int
    key: str
    members: Members


def whole_samples(shards: ShardSet, storage: Storage) -> Iterator[WholeSample]:
    """All samples in the order of the shards. Raises UserError for damage, which would change the order of the data."""
    opened = OpenShards(shards, storage)
    for number in range(len(shards.locations)):
        try:
            index = opened(number).index
            if lost := index.damage():
                raise DamagedTar(lost)
            if len(index) != shards.samples[number]:
                raise DamagedTar(f"its manifest says {shards.samples[number]} samples, and it has {len(index)}")
            for start, size in zip(index.starts.tolist(), index.sizes.tolist(), strict=True):
                content = opened(number).read(start, size)
                key, places = locate_members(reader_of(content), len(content))
                yield WholeSample(number, key, {name: content[at : at + length] for name, at, length in places})
        except (DamagedTar, SourceError) as error:
            raise UserError(
                f"the shard {shards.name(number)} can't be written again ({error}); see what is wrong with tools/check_data.py"
            ) from error


def rewrite_shards(shards: ShardSet, storage: Storage, out: Path, change: Change, labels: Labels) -> int:
    """Writes every sample as `change` gives it, see `write_again`; returns how many were written."""

    def changed() -> Iterator[WholeSample]:
        for sample in whole_samples(shards, storage):
            if (members := change(sample.key, sample.members)) is not None:
                yield sample._replace(members=members)

    return write_again(shards, changed(), out, labels)


def write_again(shards: ShardSet, samples: Iterable[WholeSample], out: Path, labels: Labels) -> int:
    """Writes samples of `shards`, in their order, into shards of the same names in `out`; returns how many.

    Where none is left out, the order of the data, crops and captions are those of `shards`. labels: of the manifest.
    Raises UserError when `out` holds shards already.
    """
    if (out / MANIFEST).exists() or list(out.glob("*.tar")):
        raise UserError(f"{out} holds shards already; choose another folder or remove them")
    names = [location.rpartition("/")[2] for location in shards.locations]
    if twice := sorted(name for name in set(names) if names.count(name) > 1):
        raise UserError(f"several of the shards are called {twice[0]}; write each set into a folder of its own")
    written, current = 0, -1
    whole = {"classes": labels.get("classes"), "templates": labels.get("templates")}
    with ShardWriter(out, sys.maxsize, **whole, teacher=labels.get("teacher")) as writer:
        for shard, key, members in samples:
            if shard != current:
                writer.begin_shard(names[shard])
                current = shard
            writer.write(key, members)
            written += 1
    return written


def remove_shards(out: Path) -> None:
    """Takes away what `write_again` wrote into `out`, of which there was nothing before."""
    for path in (*out.glob("*.tar"), *out.glob(f"*.tar{SUFFIX}"), out / MANIFEST):
        path.unlink(missing_ok=True)
    if not list(out.iterdir()):
        out.rmdir()


def labels_of(shards: ShardSet, storage: Storage) -> Labels:
    """Class names and templates of the manifest beside the shards."""
    manifest = read_manifest(shards.locations, storage)
    return Labels(classes=manifest.get("classes"), templates=manifest.get("templates")) if manifest else Labels()


def share_of(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on seed and key alone, for a share of the samples."""
    return int(sha256(f"{seed}/{key}".encode())[:13], 16) / 16**13
