"""When a rank counts as slow, and when a job counts as hanging."""

import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsclip.train.hangs import LONGER, Heart
from dsclip.train.metrics_log import MetricsLog
from dsclip.train.stragglers import JUDGED_STEPS, OwnTime, Stragglers


def judged(own_s: list[float], *, step_s: float = 1.0, logs: int = 2):
    """What is said of ranks whose own work takes own_s a step."""
    each, found = JUDGED_STEPS // logs, Stragglers()
    return [
        found.judge([OwnTime(f"h{i}", each, each * s, each * step_s) for i, s in enumerate(own_s)]) for _ in range(logs)
    ]


def test_a_slow_rank_is_named_once_enough_steps_have_come_together():
    (first, early), (last, slow) = judged([0.1, 0.3, 0.12, 0.1])
    assert early is None and first == last == {
        "own_seconds": pytest.approx(0.1),
        "own_seconds_slowest": pytest.approx(0.3),
    }
    assert str(slow) == (
        "rank 1 on h1 is slow: 0.3 s of its own work a step before it meets the others, against 0.1 s of the median rank, "
        "in steps of 1 s"
    )


def test_a_rank_is_not_slow_when_the_others_hardly_wait_for_it():
    assert judged([0.1, 0.19])[-1][1] is None and judged([0.1, 0.21])[-1][1].rank == 1
    assert judged([0.001, 0.01])[-1][1] is None  # ten times as long, and 1% of a step
    assert judged([0.9, 0.9, 0.9])[-1][1] is None
    assert judged([0.5], logs=1) == [({}, None)]  # a single rank has nobody to wait


def test_the_first_step_of_a_launch_counts_for_nothing():
    found = Stragglers()
    found.add(60.0, 60.0)
    assert found.taken().steps == 0 and found.judge([found.taken()] * 2) == ({}, None)
    found.add(0.5, 1.0)
    taken = found.taken()
    assert (taken.steps, taken.own_s, taken.whole_s) == (1, 0.5, 1.0) and found.taken().steps == 0


def test_a_hang_is_so_many_polls_without_a_beat():
    heart = Heart(minutes=0.1)  # 6 polls
    assert [heart.polled() for _ in range(6)] == [False] * 5 + [True]
    heart.beat("computing", 3)
    assert not heart.polled()
    heart.beat("saving", longer=True)
    assert [heart.polled() for _ in range(6 * LONGER)].index(True) == 6 * LONGER - 1
    heart.beat()  # it still saves
    assert not any(heart.polled() for _ in range(6 * LONGER - 1))
    assert not any(Heart(minutes=0).polled() for _ in range(10_000))


def test_a_rank_that_is_told_of_a_hang_says_where_it_is_and_ends():
    code = """
import os, time
from dsclip.distributed import Collectives
from dsclip.train.hangs import TELL, Heart
from dsclip.train.stop import StopSignals
heart = Heart(minutes=0)
with StopSignals(Collectives(rank=3), heart):
    heart.beat("computing", 7)
    os.kill(os.getpid(), TELL)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 4, done.stderr
    assert "hangs: step 7, computing, without progress" in done.stderr and "dsclip: rank 3 on " in done.stderr
    assert 'File "<string>", line 10 in <module>' in done.stderr  # of the main thread


def test_tensorboard_shows_the_slow_rank_beside_other_speeds(tmp_path):
    log = MetricsLog(tmp_path, True)
    log.log(50, {"slow_rank": 1, "own_seconds": 0.25}, slow_host="h1")
    log.close()
    found = EventAccumulator(str(tmp_path / "tb"))
    found.Reload()
    assert found.Scalars("speed/slow_rank")[0].value == 1 and found.Scalars("speed/own_seconds")[0].value == 0.25
