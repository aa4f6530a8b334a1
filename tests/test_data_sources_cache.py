"""Copies of remote shards without an index: once a machine, fetched again when they gave way, refused when they can't fit."""

import itertools

import pytest

from dsclip.config.schema import DataSection
from dsclip.data import ShardWriter, build_loader
from dsclip.data.reading.samples import SampleReader
from dsclip.data.shards.shard_set import open_shards
from dsclip.data.sources.storage import Storage
from dsclip.errors import UserError
from tests.http_shards import serve
from tests.shard_files import sample


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Three shards with a manifest and no index."""
    monkeypatch.setenv("DSCLIP_CACHE", str(tmp_path / "cache"))
    with ShardWriter(tmp_path / "set", 10) as writer:
        for i in range(30):
            writer.write(f"{i:05d}", sample(i))
    for path in (tmp_path / "set").glob("*.idx"):
        path.unlink()
    return tmp_path / "set"


def loader(tokenizer, url, host, **options):
    data = DataSection(train_shards=url, trusted_hosts=[host], retries=0, **{"workers": 0, **options})
    return build_loader(data, tokenizer=tokenizer, image_size=16, context_length=16, global_batch_size=8, seed=0)


def test_a_copy_that_gave_way_is_fetched_again(written, tmp_path):
    with serve(written) as (_, url, host):
        samples = SampleReader(open_shards(url, Storage((host,))), Storage((host,)))
        keys = [samples.read(shard, 0).key for shard in range(3)]
        for path in (tmp_path / "cache" / "shards").glob("*.tar"):
            path.unlink()  # as another run does that needs the room
        assert [samples.read(shard, 0).key for shard in range(3)] == keys


def test_workers_of_a_machine_copy_a_shard_once(written, tokenizer):
    with serve(written) as (server, url, host):
        server.latency_s = 0.1
        batches = list(itertools.islice(loader(tokenizer, url, host, workers=4), 4))
        numbers = [int(c.rpartition(" ")[2]) for b in batches for c in b.report.captions]
        assert len(set(numbers[:24])) == 24
        fetched = [p for method, p, _ in server.requests if method == "GET" and p.endswith(".tar")]
        assert sorted(fetched) == ["/00000.tar", "/00001.tar", "/00002.tar"]


def test_a_set_that_the_cache_can_not_hold_is_refused_at_start(written, tokenizer, monkeypatch):
    monkeypatch.setenv("DSCLIP_SHARD_CACHE_GB", "0.00005")
    with serve(written) as (server, url, host):
        with pytest.raises(UserError, match=r"no indexes.*tools/index_shards.py http.* OUT and train on OUT, or raise"):
            loader(tokenizer, url, host)
        assert not [p for _, p, _ in server.requests if p.endswith(".tar")]


@pytest.mark.parametrize("size", ["abc", "nan", "-1", ""])
def test_a_cache_size_that_is_none_is_a_sentence(written, tokenizer, monkeypatch, size):
    monkeypatch.setenv("DSCLIP_SHARD_CACHE_GB", size)
    with serve(written) as (_, url, host), pytest.raises(UserError, match="DSCLIP_SHARD_CACHE_GB is"):
        loader(tokenizer, url, host)
