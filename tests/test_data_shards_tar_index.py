"""Indexes and manifests: what they find is what tarfile reads, and damaged ones are named."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.data.reading.samples import SampleReader
from dsclip.data.shards.index_file import from_bytes, to_bytes
from dsclip.data.shards.shard_set import open_shards
from dsclip.data.shards.tar_index import members_of, reader_of, scan
from dsclip.errors import UserError
from tests.shard_files import write_set


@pytest.mark.parametrize("damage", [b"", b"short", b"dsclipx1" + bytes(40), b"not an index" * 10])
def test_a_damaged_index_is_named(tmp_path, damage):
    write_set(tmp_path, 1, 8)
    (tmp_path / "000.tar.idx").write_bytes(damage)
    with pytest.raises(UserError, match="000.tar.idx is damaged; write it again with tools/index_shards.py"):
        SampleReader(open_shards(str(tmp_path))).read(0, 0)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "dsclip-shards-1"}',
    '{"format": "dsclip-shards-1", "shards": [{"name": "../x.tar", "samples": 1, "bytes": 1}]}',
    '{"format": "dsclip-shards-1", "shards": [{"name": "x.tar", "samples": -1, "bytes": 1}]}'])  # fmt: skip
def test_a_damaged_manifest_is_named(tmp_path, content):
    write_set(tmp_path, 1, 8)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json"):
        open_shards(str(tmp_path))


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=120
)


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(NAMES, min_size=1, max_size=5, unique=True), format=st.sampled_from([0, 1, 2]), data=st.data())
def test_the_index_finds_what_tarfile_reads(keys, format, data):
    """Our header walk against Python's tarfile, in all its formats, with long and odd names."""
    expected, stream = {}, io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format, encoding="utf-8") as tar:
        for key in keys:
            for extension in ("jpg", "txt"):
                content = data.draw(st.binary(max_size=1500))
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                try:
                    tar.addfile(info, io.BytesIO(content))
                except ValueError:  # ustar has no room for the name
                    return
    stream.seek(0)
    with tarfile.open(fileobj=stream, encoding="utf-8") as tar:
        for member in tar:
            base = member.name.rpartition("/")[2]
            stem, _, extension = base.partition(".")
            expected.setdefault(member.name[: len(member.name) - len(base)] + stem, []).append(
                (extension.lower(), tar.extractfile(member).read())
            )
    content = stream.getvalue()
    index = scan(reader_of(content), len(content))
    assert from_bytes(to_bytes(index), "x", len(content)).starts.tolist() == index.starts.tolist()
    if len(expected) == len(keys) and not index.problems:
        found = {}
        for start, size in zip(index.starts.tolist(), index.sizes.tolist(), strict=True):
            key, members = members_of(content[start : start + size], ("jpg", "txt"))
            found[key] = members
        wanted = {key: {e: c for e, c in members if e in ("jpg", "txt")} for key, members in expected.items()}
        assert found == wanted
