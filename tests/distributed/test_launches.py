"""Twenty launches in a row; `python -m tests.distributed.launches OUT --launches 100` takes the real launchers, and as many as one likes."""

from tests.distributed.launches import launch_again


def test_launch_after_launch_exits_with_0_and_has_the_same_losses(tmp_path):
    found = launch_again(tmp_path, 20, ["warm"])
    assert (found["exit_0"], found["failed"]) == (20, [])
    assert not list(tmp_path.iterdir())
