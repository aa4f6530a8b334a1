"""Single samples out of shards, by their place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dsclip.data.decoding.sample import MEMBER_EXTENSIONS, BadSample, RawSample
from dsclip.data.reading.open_shards import OpenShards
from dsclip.data.shards.shard_set import ShardSet, short_name
from dsclip.data.shards.tar_index import DamagedTar, members_of, scan_file
from dsclip.data.sources.storage import LOCAL, Storage


@dataclass
class SampleReader:
    """Reads single samples of a shard set by their place. most_bytes: of a sample; larger ones are not read."""

    shards: ShardSet
    storage: Storage = LOCAL
    most_bytes: int = 1 << 26
    opened: OpenShards = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.opened = OpenShards(self.shards, self.storage)

    def read(self, shard: int, position: int) -> RawSample:
        """The sample. Raises BadSample, and SourceError when its shard can't be read at all."""
        start, size = self.locate(shard, position)
        return self.sample(shard, self.opened(shard).read(start, size), size)

    def locate(self, shard: int, position: int) -> tuple[int, int]:
        """(first byte, bytes) of a sample. Raises as `read`."""
        index = self.opened(shard).index
        if position >= len(index):
            raise BadSample("missing sample")  # the manifest promised more than the shard holds
        start, size = int(index.starts[position]), int(index.sizes[position])
        if size > self.most_bytes:
            raise BadSample("sample too large")
        return start, size

    def sample(self, shard: int, content: bytes, size: int) -> RawSample:
        """The sample in these bytes, of which there should be `size`. Raises BadSample."""
        if len(content) < size:
            raise BadSample("missing sample")
        try:
            key, members = members_of(content, MEMBER_EXTENSIONS)
        except DamagedTar as error:
            raise BadSample("damaged sample") from error
        return RawSample(self.shards.identity(shard), key, members)


def read_shard(location: str, bad: dict[str, int]) -> Iterator[RawSample]:
    """The samples of a local shard, in order; what is wrong with the shard is counted in `bad`."""
    index = scan_file(location)
    for reason, count in index.problems.items():
        bad[reason] = bad.get(reason, 0) + count
    for start, size in zip(index.starts.tolist(), index.sizes.tolist(), strict=True):
        try:
            key, members = members_of(LOCAL.read(str(location), start, size), MEMBER_EXTENSIONS)
        except DamagedTar:
            bad["damaged sample"] = bad.get("damaged sample", 0) + 1
            continue
        yield RawSample(short_name(str(location)), key, members)
