"""Shards behind addresses: the same batches as local ones, retries, refusals, and no secret in any output."""

import itertools
import json

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dsclip.config.schema import DataSection
from dsclip.data import ShardWriter, build_eval_dataset, build_loader
from dsclip.data.sources import storage as sources_module
from dsclip.data.sources.storage import SourceError, Storage, is_remote, redact
from dsclip.datasets.index import index_shards
from dsclip.errors import UserError
from tests.http_shards import serve
from tests.shard_files import sample, write_set


@pytest.fixture
def written(tmp_path):
    """A folder of shards with indexes and a manifest."""
    with ShardWriter(tmp_path / "set", 10) as writer:
        for i in range(30):
            writer.write(f"{i:05d}", sample(i))
    return tmp_path / "set"


def captions(tokenizer, shards, count=8, workers=0, **options):
    data = DataSection(train_shards=str(shards), workers=workers, shuffle_window=8, **options)
    loader = build_loader(data, tokenizer=tokenizer, image_size=16, context_length=16, global_batch_size=8, seed=0)
    batches = list(itertools.islice(loader, count))
    return [b.report.captions for b in batches], batches


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(sources_module, "LONGEST_PAUSE_S", 0.01)


@pytest.mark.parametrize("unit", [None, 100])
def test_remote_shards_give_the_batches_of_local_ones(written, tokenizer, unit):
    expected, _ = captions(tokenizer, written, shuffle_unit=unit)
    with serve(written) as (server, url, host):
        for spec in (url, f"{url}/{{00000..00002}}.tar", f"{url}/manifest.json"):
            found, _ = captions(tokenizer, spec, shuffle_unit=unit, trusted_hosts=[host])
            assert found == expected
        assert all(h.get("Range") for m, p, h in server.requests if m == "GET")
        if unit:  # whole windows are read at once
            reads = [p for m, p, _ in server.requests if m == "GET" and p.endswith(".tar")]
            assert len(reads) < 3 * 64


def test_a_remote_shard_without_an_index_is_fetched_once_and_kept_by_its_address(tmp_path, tokenizer, monkeypatch):
    """Two sets with equal file names (S12): a cache by name would give the second the pictures of the first."""
    monkeypatch.setenv("DSCLIP_CACHE", str(tmp_path / "cache"))
    for name, first in (("a", 0), ("b", 500)):
        with ShardWriter(tmp_path / name, 10) as writer:
            for i in range(first, first + 10):
                writer.write(f"{i:05d}", sample(i))
        next((tmp_path / name).glob("*.idx")).unlink()
    with serve(tmp_path) as (server, url, host):
        for name, low in (("a", 0), ("b", 500), ("a", 0)):
            found, _ = captions(tokenizer, f"{url}/{name}/00000.tar", count=5, trusted_hosts=[host])
            numbers = {int(c.rpartition(" ")[2]) for batch in found for c in batch}
            assert numbers == set(range(low, low + 10))
        fetched = [p for m, p, _ in server.requests if m == "GET" and p.endswith(".tar")]
        assert sorted(fetched) == ["/a/00000.tar", "/b/00000.tar"]


def test_shards_without_a_manifest_are_indexed_from_afar(tmp_path, tokenizer):
    write_set(tmp_path / "far", 3, 10)
    expected, _ = captions(tokenizer, tmp_path / "far")
    with serve(tmp_path / "far") as (_, url, host):
        with pytest.raises(UserError, match="tools/index_shards.py"):
            captions(tokenizer, f"{url}/{{000..002}}.tar", trusted_hosts=[host])
        found = index_shards(f"{url}/{{000..002}}.tar", tmp_path / "near", Storage((host,)))
        assert [e["samples"] for e in found.entries] == [10, 10, 10] and not found.problems
        remote, batches = captions(tokenizer, tmp_path / "near", trusted_hosts=[host])
    # The names of folder and server differ, and with them the sample ids, but not the order.
    assert remote == expected and sum(b.report.read for b in batches) == 64


def test_remote_evaluation_shards_are_read_with_trusted_hosts_and_retries(tmp_path, monkeypatch):
    monkeypatch.setenv("DSCLIP_CACHE", str(tmp_path / "cache"))
    with ShardWriter(tmp_path / "set", 10, classes=["a", "b"]) as writer:
        for i in range(12):
            writer.write(f"{i:05d}", sample(i) | {"cls": b"1"})
    expected = build_eval_dataset(str(tmp_path / "set"), image_size=16)
    with serve(tmp_path / "set") as (server, url, host):
        with pytest.raises(UserError, match="data.trusted_hosts can allow"):
            build_eval_dataset(url, image_size=16)
        server.failures = {"00001.tar": 1}
        found = build_eval_dataset(url, image_size=16, storage=Storage((host,), retries=1))
        assert found.captions == expected.captions and found.classes == expected.classes == ["a", "b"]
        server.failures = {"00002.tar": 10**6, "manifest.json": 0}
        with pytest.raises(UserError, match="00002.tar"):
            build_eval_dataset(f"{url}/00002.tar", image_size=16, storage=Storage((host,), retries=1))


class Bucket(MemoryFileSystem):
    """fsspec's file system in memory, under the addresses of an object store."""

    protocol = "s3"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("s3://", "memory://"))


def test_object_stores_are_read_through_fsspec(written, tokenizer):
    fsspec.register_implementation("s3", Bucket, clobber=True)
    memory = fsspec.filesystem("s3")
    for path in written.iterdir():
        memory.pipe_file(f"s3://bucket/set/{path.name}", path.read_bytes())
    try:
        sources_module._filesystem.cache_clear()
        expected, _ = captions(tokenizer, written)
        assert captions(tokenizer, "s3://bucket/set")[0] == expected
    finally:
        memory.rm("s3://bucket", recursive=True)
        sources_module._filesystem.cache_clear()


def test_failures_and_broken_connections_are_tried_again(written, tokenizer):
    expected, _ = captions(tokenizer, written)
    with serve(written) as (server, url, host):
        server.failures = {"00001.tar": 3, "manifest.json": 2, "00000.tar.idx": 1}
        server.cuts = {"00002.tar": 2}
        assert captions(tokenizer, url, trusted_hosts=[host])[0] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_stays_unreadable_stops_the_run_or_is_left_out(written, tokenizer, workers):
    with serve(written) as (server, url, host):
        server.failures = {"00001.tar": 10**6}
        options = dict(trusted_hosts=[host], retries=1, workers=workers)
        with pytest.raises(UserError, match=r"00001.tar can't be read .*503.*on_unreadable=skip"):
            captions(tokenizer, url, **options)
        found, batches = captions(tokenizer, url, on_unreadable="skip", max_bad_fraction=1.0, **options)
    numbers = {int(c.rpartition(" ")[2]) for batch in found for c in batch}
    assert numbers == set(range(10)) | set(range(20, 30))
    journal = [entry for b in batches for entry in b.report.journal]
    assert {e["what"] for e in journal} == {"unreadable, left out"} and len(journal) <= max(1, workers)
    assert sum(b.report.bad.get("unreadable shard", 0) for b in batches) >= 20


def test_a_server_without_range_requests_is_named(written, tokenizer):
    with serve(written) as (server, url, host):
        server.ranges = False
        with pytest.raises(UserError, match="range requests"):
            captions(tokenizer, url, trusted_hosts=[host])


def test_a_dead_server_is_an_error_not_an_empty_data_set(tokenizer, monkeypatch):
    monkeypatch.setenv("GOPEN_VERBOSE", "1")  # with webdataset's opener the failure would read as an empty file (S13)
    with pytest.raises(UserError, match="manifest can't be read"):
        captions(tokenizer, "http://127.0.0.1:9/set", trusted_hosts=["127.0.0.1:9"], retries=1)


@pytest.mark.parametrize(
    "target",
    ["http://169.254.169.254/latest/meta-data", "https://127.0.0.1/x.tar", "https://[::1]/x", "http://example.org/"],
)
def test_redirects_into_the_network_are_not_followed(written, target):
    """S18: a server out there must not make the trainer ask the cloud's metadata service."""
    with serve(written) as (server, url, host):
        server.redirects = {"00000.tar": target}
        with pytest.raises(SourceError, match="no public address|only https"):
            Storage((host,), retries=0).read(f"{url}/00000.tar", 0, 10)
        assert len(server.requests) == 1


def test_private_addresses_are_refused_unless_trusted(written):
    with serve(written) as (server, url, host):
        with pytest.raises(SourceError, match="only https is read; data.trusted_hosts can allow"):
            Storage(retries=0).read(f"{url}/00000.tar", 0, 10)
        with pytest.raises(SourceError, match="no public address"):
            Storage(retries=0).read("https://127.0.0.1:1/00000.tar", 0, 10)
        assert not server.requests
        assert len(Storage((host,)).read(f"{url}/00000.tar", 0, 10)) == 10


SECRETS = [
    "hf_abcdefghijklmnop",
    "AKIAABCDEFGHIJKLMNOP",
    "Bearer sk-1234567890",
    "s3cr3tpassw0rd",
    "X-Amz-Signature=abcdef0123",
]


def test_no_secret_reaches_an_error_or_a_log(written, tokenizer, monkeypatch, capfd):
    monkeypatch.setenv("DSCLIP_AUTHORIZATION", SECRETS[2])
    messages = []
    with serve(written) as (server, url, host):
        server.failures = {"00001.tar": 10**6, "00000.tar": 0}
        _, batches = captions(
            tokenizer, url, trusted_hosts=[host], retries=0, on_unreadable="skip", max_bad_fraction=1.0
        )
        messages.append(json.dumps([b.report.journal for b in batches]))
        assert any(h.get("Authorization") == SECRETS[2] for _, _, h in server.requests), "the server got it"
        with pytest.raises(SourceError) as failure:
            Storage((host,), retries=0).read(f"{url}/no.tar?{SECRETS[4]}&token={SECRETS[0]}", 0, 9)
        messages.append(str(failure.value))
    with pytest.raises(UserError) as refused:
        is_remote(f"https://user:{SECRETS[3]}@host/a.tar")
    messages.append(str(refused.value))
    messages.append(redact(" ".join(SECRETS)))
    out = capfd.readouterr()
    for text in (*messages, out.out, out.err):
        for secret in (*SECRETS[:2], "sk-1234567890", "abcdef0123"):
            assert secret not in text
    assert SECRETS[3] not in messages[2]


def test_the_authorization_stays_with_its_host(written, monkeypatch):
    monkeypatch.setenv("DSCLIP_AUTHORIZATION", SECRETS[2])
    with serve(written) as (first, url, host), serve(written) as (second, other_url, other):
        first.redirects = {"00000.tar": f"{other_url}/00000.tar"}
        Storage((host, other)).read(f"{url}/00000.tar", 0, 10)
        assert "Authorization" in first.requests[-1][2] and "Authorization" not in second.requests[-1][2]
