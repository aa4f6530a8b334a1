"""Remote shards are read ahead: the same batches, soon, without common pauses, in bounded memory, over few connections."""

import itertools
import json
import time

import pytest

from dsclip.config.schema import DataSection
from dsclip.data import ShardWriter, build_loader
from dsclip.data.order.exact import SetOrder
from dsclip.data.reading.ahead import THREADS, ReadAhead, Threads
from dsclip.data.reading.samples import SampleReader
from dsclip.data.shards.shard_set import open_shards
from dsclip.data.sources.storage import LOCAL, Storage
from dsclip.datasets.index import index_shards
from tests.http_shards import serve
from tests.programs import run_program
from tests.shard_files import sample, write_set

SHARDS, SHARD_SIZE = 4, 400


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    members = [sample(i) for i in range(20)]
    with ShardWriter(folder, SHARD_SIZE) as writer:
        for i in range(SHARDS * SHARD_SIZE):
            writer.write(f"{i:05d}", {"jpg": members[i % 20]["jpg"], "txt": f"picture {i}".encode()})
    return folder


def batches(tokenizer, shards, batch=64, **options):
    data = DataSection(train_shards=str(shards), **{"workers": 0, "retries": 0, **options})
    return iter(
        build_loader(data, tokenizer=tokenizer, image_size=16, context_length=16, global_batch_size=batch, seed=0)
    )


def captions(found, count):
    return [b.report.captions for b in itertools.islice(found, count)]


@pytest.mark.parametrize("options", [{}, {"shuffle_unit": 400}, {"resampled": True, "shuffle_window": 9}])
def test_what_is_read_ahead_never_changes_what_is_drawn(tmp_path, tokenizer, options):
    write_set(tmp_path, 2, 40)
    index_shards(str(tmp_path), None, LOCAL)
    expected = captions(batches(tokenizer, tmp_path, batch=8, **options), 25)  # more than two epochs
    with serve(tmp_path) as (_, url, host):
        for megabytes in (0, 512):
            found = batches(tokenizer, url, batch=8, read_ahead_mb=megabytes, trusted_hosts=[host], **options)
            assert captions(found, 25) == expected, megabytes


def test_the_first_batch_does_not_wait_for_whole_windows(written, tokenizer):
    """Each of 256 streams once read its window, here 6 samples in 6 requests, before the first batch was there."""
    with serve(written) as (server, url, host):
        server.latency_s = 0.02
        started = time.monotonic()
        found = next(batches(tokenizer, url, batch=256, trusted_hosts=[host]))
        assert time.monotonic() - started < 5 and len(found.report.captions) == 256
        assert 0 < found.report.waited < found.report.seconds
        # One request a connection at most THREADS at a time, all of them kept, and one for the manifest.
        assert server.connections <= THREADS + 1 < len(server.requests)


def test_streams_begin_new_blocks_one_after_another_in_bounded_memory(written):
    """When all of them did at the same batch, every batch between was fast and that one took as long as all together."""
    streams, bound, begun = range(32), 2_000_000, []
    with serve(written) as (_, url, host):
        samples = SampleReader(open_shards(url, Storage((host,))), Storage((host,)))
        order = SetOrder(samples.shards.samples, global_batch=32, streams=32, seed=0, window=50, unit=400)
        threads = Threads()
        ahead = ReadAhead(samples, order, dict.fromkeys(streams, 0), 1, bound, threads)
        for draw in range(60):
            before = [state.next for state in ahead._streams.values()]
            for stream in streams:
                content, size = ahead.take(stream, draw)
                assert len(content) == size
            ahead.fill()
            begun.append(sum(state.next > old for state, old in zip(ahead._streams.values(), before, strict=True)))
        threads.close()
    assert max(begun[30:]) <= 16 and sum(count > 0 for count in begun[30:]) > 8, begun
    assert bound / 4 < ahead.peak_bytes <= bound * 1.1


def test_the_bench_of_far_shards_prints_its_numbers(demo):
    done = run_program(
        "tools/bench_data.py", "--latency-ms", "5", "--batch", "64", "--workers", "2", "--batches", "4",
        "--image-size", "32", "--shards", "demo", "--json",
    )  # fmt: skip
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert 0 < found["first_batch_seconds"] < 60 and found["stalls"] >= 0 and found["peak_worker_mb"] > 0
