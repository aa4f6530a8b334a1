"""data.order=stream: every sample once an epoch, resume to the shard, and what is wrong with shards is counted."""

import gzip
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from dsclip.config.schema import DataSection
from dsclip.data import build_loader, merge_states
from dsclip.data.order.shards import ShardOrder, check_readers
from dsclip.errors import UserError
from tests.http_shards import serve
from tests.shard_files import sample, write_set, write_tar

SHARDS, PER_SHARD = 8, 5


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "plain", SHARDS, PER_SHARD)


def loader(tokenizer, shards, *, rank=0, ranks=1, batch=8, seed=3, state=None, **options):
    data = DataSection(**{"train_shards": str(shards), "order": "stream", "workers": 0, "retries": 2} | options)
    return build_loader(
        data, tokenizer=tokenizer, image_size=16, context_length=16, global_batch_size=batch, seed=seed, rank=rank,
        world_size=ranks, state=state,
    )  # fmt: skip


def taken(loader, batches: int) -> list:
    return list(islice(iter(loader), batches))


def numbers(batches) -> list[int]:
    """The samples of batches by the numbers in their captions."""
    return [int(caption.split()[-1]) for batch in batches for caption in batch.report.captions]


@pytest.mark.parametrize("shards, streams", [(8, 4), (9, 4), (5, 5), (7, 1)])
def test_an_epoch_visits_every_shard_once_in_an_order_of_its_own(shards, streams):
    order = ShardOrder(shards, streams, seed=1)
    orders = []
    for epoch in range(3):
        visits = []
        for stream in range(streams):
            own = order.an_epoch(stream)
            visits += [order.visit(stream, epoch * own + i) for i in range(own)]
        assert sorted(shard for shard, _ in visits) == list(range(shards)) and {e for _, e in visits} == {epoch}
        orders.append([shard for shard, _ in visits])
    assert orders[0] != orders[1] != orders[2]
    assert ShardOrder(shards, streams, seed=1).visit(0, 1) == order.visit(0, 1)
    assert [ShardOrder(64, 1, seed=2).visit(0, i)[0] for i in range(9)] != [
        ShardOrder(64, 1, seed=1).visit(0, i)[0] for i in range(9)
    ]


@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 2), (4, 1)])
def test_all_ranks_and_workers_together_give_every_sample_once_an_epoch(ranks, workers, folder, tokenizer):
    epochs = [[], []]
    for rank in range(ranks):
        batches = taken(loader(tokenizer, folder, rank=rank, ranks=ranks, workers=workers), 10)
        epochs[0] += numbers(batches[:5])
        epochs[1] += numbers(batches[5:])
        assert batches[4].report.epoch == pytest.approx(1.0) and len(batches[0].images) == 8 // ranks
        assert batches[0].images.shape[1:] == (3, 16, 16) and batches[0].tokens.shape[1] == 16
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(SHARDS * PER_SHARD))
    assert epochs[0] != epochs[1]


def test_the_order_is_a_function_of_the_seed_and_shuffled_beyond_the_shard(folder, tokenizer):
    first = taken(loader(tokenizer, folder), 5)
    assert numbers(first) == numbers(taken(loader(tokenizer, folder), 5))
    assert numbers(first) != numbers(taken(loader(tokenizer, folder, seed=4), 5))
    assert len({number // PER_SHARD for number in numbers(first[:1])}) > 2
    in_sequence = numbers(taken(loader(tokenizer, folder, shuffle_window=1), 5))
    assert all(in_sequence[i : i + 5] == sorted(in_sequence[i : i + 5]) for i in range(0, 40, 5))


def test_a_sample_is_the_same_as_in_the_exact_order(folder, tokenizer):
    """Its id, and so what patch dropout leaves of it and how it is augmented."""
    ids = {}
    for order in ("stream", "exact"):
        batches = taken(loader(tokenizer, folder, order=order), 5)
        rows = [(n, i) for b in batches for n, i in zip(numbers([b]), b.sample_ids.tolist(), strict=True)]
        ids[order] = dict(rows)
    assert ids["stream"] == ids["exact"] and len(ids["exact"]) == SHARDS * PER_SHARD


def test_resume_is_to_the_shard(folder, tokenizer):
    """What was finished doesn't come again in its epoch; unfinished shards come whole."""
    options = dict(ranks=2, workers=1, shuffle_window=1, batch=4)
    before, states = [], []
    for rank in range(2):
        batches = taken(
            loader(tokenizer, folder, rank=rank, **options), 7
        )  # 14 samples a reader: two shards of four, and 4
        before += numbers(batches)
        states.append(batches[-1].state)
    assert [state["drawn"] for state in states] == [[[2]], [[2]]]
    merged, after = merge_states(states[::-1]), []
    for rank in range(2):
        after += numbers(taken(loader(tokenizer, folder, rank=rank, state=merged, **options), 5))
    finished = {
        n // PER_SHARD
        for n, count in Counter(n // PER_SHARD for n in before).items()
        for n in [n * PER_SHARD]
        if count == 5
    }
    assert len(finished) == 4 and len(after) == 20
    assert sorted(after) == [n for n in range(SHARDS * PER_SHARD) if n // PER_SHARD not in finished]


def test_a_position_counts_what_was_used_not_what_was_read(folder, tokenizer):
    """With a buffer larger than the data all shards are read at once, and none is finished."""
    batches = taken(loader(tokenizer, folder), 5)
    assert batches[0].state["drawn"] == [[0]] and batches[4].state["drawn"] == [[SHARDS]]


def test_another_number_of_readers_and_another_order_are_refused(folder, tokenizer):
    state = taken(loader(tokenizer, folder), 1)[0].state
    with pytest.raises(UserError, match="readers .ranks x workers. was 1 and is 2"):
        loader(tokenizer, folder, workers=2, state=state)
    with pytest.raises(UserError, match="data.order was stream and is exact"):
        loader(tokenizer, folder, order="exact", state=state)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(workers=9), "9 loader workers reads shards of its own, and there are 8; set data.workers to 8 or less"),
        (dict(ranks=9, batch=9), "use 8 ranks or less"),
        (dict(workers=3), "3 doesn't divide batch.global_batch_size 8"),
        (dict(weights=[1.0]), "data.weights needs data.order=exact"),
        (dict(shuffle_unit=4), "data.shuffle_unit needs data.order=exact"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_with_what_to_change(options, message, folder, tokenizer):
    with pytest.raises(UserError, match=message):
        loader(tokenizer, folder, **options)


def test_resampled_shards_come_with_replacement(folder, tokenizer):
    seen = Counter(numbers(taken(loader(tokenizer, folder, resampled=True, shuffle_window=1), 5)))
    assert len(seen) < SHARDS * PER_SHARD and check_readers(8, 8, 2, 2) is None


def test_broken_samples_and_shards_are_counted_and_never_mixed(tmp_path, tokenizer):
    """Every shard has the same keys: what a truncated one lacks must not come from the next."""
    for s in range(4):
        members = {f"{i:03d}": sample(100 * s + i) for i in range(30)}
        if s == 1:
            members["003"]["jpg"] = b"no picture"
            del members["004"]["jpg"]
        write_tar(tmp_path / f"{s}.tar", members)
    content = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(content[: len(content) // 2 + 700])
    broken = bytearray((tmp_path / "3.tar").read_bytes())
    at = broken.index(b"010.jpg")
    broken[at : at + 1024] = b"x" * 1024
    (tmp_path / "3.tar").write_bytes(broken)
    batches = taken(loader(tokenizer, tmp_path, max_bad_fraction=0.5), 13)
    bad = sum((Counter(b.report.bad) for b in batches), Counter())
    assert bad["damaged shard"] >= 2 and bad["undecodable image"] >= 1 and bad["no image"] >= 1
    assert {entry["shard"].split("/")[-1] for b in batches for entry in b.report.journal} >= {"2.tar", "3.tar"}
    used = {n: image for b in batches for n, image in zip(numbers([b]), b.images, strict=True)}
    assert len(used) > 40
    for number in (205, 206, 207, 305, 306):  # before the damage; the next shard has samples of the same names
        alone = tmp_path / "alone" / str(number)
        alone.mkdir(parents=True)
        write_tar(alone / f"{number // 100}.tar", {f"{number % 100:03d}": sample(number)})
        assert torch.equal(used[number], taken(loader(tokenizer, alone, batch=1), 1)[0].images[0])


def test_a_compressed_archive_and_an_empty_set_end_with_a_sentence(tmp_path, tokenizer):
    write_tar(tmp_path / "a.tar", {"x": sample(1)})
    (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(UserError, match="damaged shard"):
        taken(loader(tokenizer, tmp_path, batch=1), 1)
    write_tar(tmp_path / "a.tar", {})
    with pytest.raises(UserError, match="there is no sample in any of the 1 shards"):
        taken(loader(tokenizer, tmp_path, batch=1), 1)


def test_a_server_without_ranges_manifest_or_index_is_enough(folder, tokenizer):
    with serve(folder) as (server, url, host):
        server.ranges = False
        server.cuts = {"002.tar": 2, "005.tar": 1}  # connections that break off are made again, up to where they were
        options = dict(trusted_hosts=[host], workers=0)
        remote = taken(loader(tokenizer, f"{url}/{{000..007}}.tar", **options), 5)
        asked = Counter(path for _, path, _ in server.requests)
        with pytest.raises(UserError, match="can't be read"):
            taken(loader(tokenizer, f"{url}/{{900..907}}.tar", **options), 1)
    assert sorted(numbers(remote)) == list(range(SHARDS * PER_SHARD))
    assert asked["/002.tar"] == 3 and asked["/005.tar"] == 2 and asked["/001.tar"] == 1
    assert sum(b.report.waited for b in remote) > 0
    local = taken(loader(tokenizer, folder), 5)
    assert all(np.array_equal(a.images, b.images) for a, b in zip(remote, local, strict=True))
