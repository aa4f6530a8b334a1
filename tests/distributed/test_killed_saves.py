"""Ranks that are killed while they save, a handful of times; `python -m tests.distributed.killed_saves` does it as often as one likes."""

from tests.distributed.killed_saves import kill_saves


def test_whoever_is_killed_within_a_save_the_newest_complete_checkpoint_continues_the_run(tmp_path):
    found = kill_saves(tmp_path, kills=2, seed=0, runs=[(3, "background")])
    assert found["kills"] == 2 and found["steps"] > 2
