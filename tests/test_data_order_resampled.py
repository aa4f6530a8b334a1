"""The resampled order: no sample twice in a batch, every sample seen equally often, long runs of neighbours."""

import pickle
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.data.order.exact import SetOrder
from dsclip.data.order.laps import Laps
from tests.test_data_order import mixed_three_to_one

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum)
SHAPES = dict(sizes=SIZES, quota=st.integers(1, 4), streams=st.sampled_from([1, 2, 3, 8]),
              seed=st.integers(0, 99), window=st.integers(1, 50))  # fmt: skip


def make(sizes, quota, streams, seed, window):
    return SetOrder(
        np.array(sizes), global_batch=quota * streams, streams=streams, seed=seed, window=window, resampled=True
    )


def batch(order, quota, streams, number):
    """The draws of a global batch, as the workers of W ranks would put them together."""
    return [order.draw(v, number * quota + i) for v in range(streams) for i in range(quota)]


@settings(deadline=None, max_examples=80)
@given(**SHAPES)
def test_no_sample_is_twice_in_a_batch_that_the_set_can_fill(sizes, quota, streams, seed, window):
    order, total = make(sizes, quota, streams, seed, window), sum(sizes)
    most = -(-quota * streams // total)  # 1, or in a set smaller than the batch as few repetitions as there can be
    for number in range(2 + 3 * total // (quota * streams)):
        counts = Counter((s, p) for s, p, _ in batch(order, quota, streams, number))
        assert max(counts.values()) <= most
        assert most == 1 or len(counts) == total and min(counts.values()) >= most - 1


@settings(deadline=None, max_examples=80)
@given(**SHAPES)
def test_every_sample_is_seen_equally_often(sizes, quota, streams, seed, window):
    """At any batch the counts of two samples differ by two at most, and by one where a pass ends; once a lap each."""
    order, total, size = make(sizes, quota, streams, seed, window), sum(sizes), quota * streams
    laps = Laps(total, global_batch=size, streams=streams, seed=seed, window=window)
    counts = Counter({(s, p): 0 for s, n in enumerate(sizes) for p in range(n)})
    seen, in_pass = Counter(), Counter()
    for number in range(2 + 4 * max(total, size) // size):
        draws = batch(order, quota, streams, number)
        seen.update(draws)
        counts.update((s, p) for s, p, _ in draws)
        in_pass.update((s, p) for s, p, _ in draws)
        assert len(counts) == total
        assert max(counts.values()) - min(counts.values()) <= 2
        if (number + 1) * size % laps.pass_samples == 0:
            assert max(counts.values()) - min(counts.values()) <= 1
            assert total < size or set(in_pass.values()) == {1}
            in_pass.clear()
    assert max(seen.values()) == 1


@settings(deadline=None, max_examples=200)
@given(total=st.integers(1, 5000), quota=st.integers(1, 9), streams=st.integers(1, 40), window=st.integers(1, 600))
def test_a_pass_sees_nearly_all_of_a_set(total, quota, streams, window):
    size = quota * streams
    laps = Laps(total, global_batch=size, streams=streams, seed=0, window=window)
    assert laps.size % quota == 0 and laps.size <= max(window, quota)
    assert laps.pass_samples == laps.rounds * streams * laps.size
    if total >= size:
        assert total - laps.rounds * size < laps.pass_samples <= total
    else:
        assert laps.pass_samples == size


def test_a_stream_reads_long_runs_of_neighbours():
    laps = Laps(10_000, global_batch=8, streams=4, seed=0, window=100)
    assert (laps.size, laps.rounds, laps.pass_samples) == (100, 25, 10_000)
    for stream in range(4):
        for unit in range(60):
            places = sorted(laps.draw(stream, unit * 100 + i)[0] for i in range(100))
            assert np.count_nonzero(np.diff(places) != 1) <= 1, "one run, or two where the ring is closed"


def test_what_is_cut_and_left_over_changes_from_pass_to_pass():
    full = Laps(1000, global_batch=4, streams=4, seed=0, window=50)
    runs = {tuple(sorted(full.draw(0, unit * 50 + i)[0] for i in range(50))) for unit in range(100)}
    assert full.pass_samples == 1000 and len(runs) > 90, "though each pass is the whole set"
    rest = Laps(90, global_batch=40, streams=4, seed=0, window=50)
    left = [{*range(90)} - {rest.draw(v, p * 20 + i)[0] for v in range(4) for i in range(20)} for p in range(3)]
    assert [len(x) for x in left] == [10] * 3 and not (left[0] & left[1] or left[1] & left[2])


def test_the_order_changes_with_the_seed_and_is_a_function_of_the_position():
    def drawn(order):
        return [order.draw(v, d) for d in range(60) for v in range(4)]

    one, other = (make([50, 30], 2, 4, seed, 9) for seed in (0, 1))
    assert drawn(one) != drawn(other)
    assert drawn(one)[::-1] == [one.draw(v, d) for d in reversed(range(60)) for v in reversed(range(4))]
    assert drawn(pickle.loads(pickle.dumps(one))) == drawn(one)


def test_sets_that_are_mixed_repeat_no_sample_in_a_lap():
    """A stream's draws of one set then differ in number from another's: evenness holds a lap, not a batch."""
    seen = Counter(mixed_three_to_one([make([40], 2, 4, 5, 7), make([10, 10], 2, 4, 5, 7)], 4))
    assert set(seen.values()) == {1} and sum(d.data_set == 0 and d.round == 9 for d in seen) == 40


def test_a_position_in_two_billion_samples_is_found_at_once():
    order = make([10_000] * 200_000, 32, 1024, 0, 512)
    shard, position, lap = order.draw(1023, 5 * 10**6)
    assert lap == 2 and 0 <= shard < 200_000 and 0 <= position < 10_000
