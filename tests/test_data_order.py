"""The order of samples: every sample once an epoch, streams in step, weights, windows, and the scale of LAION."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.data.order.exact import Draw, Order, SetOrder, check_split, default_streams
from dsclip.errors import UserError

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum)


def make(sizes, batch, *, streams=None, seed=0, window=7, **options):
    return SetOrder(
        np.array(sizes), global_batch=batch, streams=streams or default_streams(batch), seed=seed, window=window, **options
    )  # fmt: skip


def sequence(order: SetOrder, batch: int, streams: int, batches: int) -> list[tuple[int, int, int]]:
    """The draws of whole global batches, as the workers of W ranks would put them together."""
    quota = batch // streams
    return [order.draw(v, b * quota + i) for b in range(batches) for v in range(streams) for i in range(quota)]


@settings(deadline=None, max_examples=80)
@given(sizes=SIZES, quota=st.integers(1, 4), streams=st.sampled_from([1, 2, 3, 8]), unit=st.sampled_from([1, 3, 99]),
       seed=st.integers(0, 99), window=st.integers(1, 50))  # fmt: skip
def test_every_epoch_is_every_sample_once(sizes, quota, streams, unit, seed, window):
    batch, total = quota * streams, sum(sizes)
    order = make(sizes, batch, streams=streams, seed=seed, window=window, unit=unit)
    batches = -(-3 * total // batch)
    drawn = sequence(order, batch, streams, batches)
    everything = {(s, p) for s, size in enumerate(sizes) for p in range(size)}
    for epoch in range(3):
        found = Counter((s, p) for s, p, e in drawn if e == epoch)
        assert set(found) == everything and set(found.values()) == {1}
    # Streams change epoch together: the first e·M slots of the sequence are those of e epochs.
    assert Counter(e for *_, e in drawn[: 2 * total]) == {0: total, 1: total}


def test_the_order_changes_with_seed_and_epoch():
    first = sequence(make([20, 20], 8), 8, 8, 15)
    other = sequence(make([20, 20], 8, seed=1), 8, 8, 15)
    assert [d[:2] for d in first[:40]] != [d[:2] for d in other[:40]]
    assert [d[:2] for d in first[:40]] != [d[:2] for d in first[40:80]]


def test_shards_that_stay_together_are_read_in_windows():
    order = make([100] * 10, 4, streams=2, window=10, unit=100)
    for stream in range(2):
        for window in range(50):
            places = [order.draw(stream, window * 10 + i) for i in range(10)]
            shard = {s for s, *_ in places}
            assert len(shard) == 1 and max(p for _, p, _ in places) - min(p for _, p, _ in places) == 9


def test_neighbours_meet_in_a_batch_as_often_as_strangers():
    """With every sample permuted on its own, near-duplicates that lie side by side still become negatives."""
    order = make([64], 16)
    together = 0
    for epoch in range(200):
        for b in range(4 * epoch, 4 * epoch + 4):
            members = {order.draw(v, b)[1] for v in range(16)}
            together += sum(i + 1 in members for i in members)
    assert together / 200 == pytest.approx(63 * 15 / 63, rel=0.1)  # each of 63 neighbours with chance 15/63


def mixed_three_to_one(sets: list[SetOrder], streams: int) -> list[Draw]:
    """2000 draws of each stream from two sets, of which the first is drawn three times as often."""
    order, draws = Order(sets, [3.0, 1.0], streams, seed=5), []
    for stream in range(streams):
        drawn = [0, 0]
        draws += [order.next(stream, drawn) for _ in range(2000)]
    picked = Counter(d.data_set for d in draws)
    assert picked[0] / picked[1] == pytest.approx(3, rel=0.08)
    return draws


def test_data_sets_are_mixed_by_weight_and_each_keeps_its_epochs():
    draws = mixed_three_to_one([make([40], 8, streams=4), make([10, 10], 8, streams=4)], 4)
    seen = Counter((d.shard, d.position) for d in draws if d.data_set == 0 and d.round == 2)
    assert len(seen) == 40 and set(seen.values()) == {1}


def test_a_position_is_all_it_takes_to_continue():
    order = Order([make([40], 8), make([25], 8)], [1.0, 2.0], 8, seed=0)
    drawn = [0, 0]
    whole = [order.next(3, drawn) for _ in range(100)]
    again = Order([make([40], 8), make([25], 8)], [1.0, 2.0], 8, seed=0)
    position = [sum(d.data_set == k for d in whole[:60]) for k in range(2)]
    assert [again.next(3, position) for _ in range(40)] == whole[60:]


def test_streams_divide_the_batch():
    assert [default_streams(n) for n in (1, 8, 96, 256, 32768, 65536, 7, 2 * 1031)] == [1, 8, 96, 256, 1024, 1024, 7, 2]


def test_splits_that_do_not_divide_are_refused_with_those_that_do():
    check_split(96, 96, 3, 4)
    check_split(96, 96, 3, 0)
    with pytest.raises(UserError, match=r"5 ranks can't share 96.*1, 2, 3, 4, 6, 8"):
        check_split(96, 96, 5, 0)
    with pytest.raises(
        UserError, match=r"a rank's 4 of 8 data streams equally; set data.workers to one of 0, 1, 2, 4$"
    ):
        check_split(8, 8, 2, 3)
    with pytest.raises(UserError, match="must divide"):
        check_split(5, 8, 1, 0)


def test_a_position_in_two_billion_samples_is_found_at_once():
    order = make([10_000] * 200_000, 32768, window=512)
    shard, position, epoch = order.draw(1023, 5 * 10**6)
    assert epoch == 2 and 0 <= shard < 200_000 and 0 <= position < 10_000
