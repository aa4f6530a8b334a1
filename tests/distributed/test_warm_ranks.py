"""The process that forks ranks behaves as a launcher does: exit codes, output, and nothing left running."""

import time

import psutil
import pytest

from tests.distributed.launch import warm

SCRIPT = """
import os, sys, time
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], *sys.argv[1:])
open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").write(str(os.getpid()))
if sys.argv[2] == "fail" and os.environ["RANK"] == "1":
    raise ValueError("rank 1 is broken")
if sys.argv[2] != "end":
    time.sleep(600)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def test_output_of_all_ranks_and_exit_code_0(script, tmp_path):
    done = warm(script, tmp_path, "end", ranks=3)
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of 3 {tmp_path} end" for rank in range(3)]


def test_a_rank_that_fails_gives_its_exit_code_and_stops_the_others(script, tmp_path):
    started = time.monotonic()
    done = warm(script, tmp_path, "fail", ranks=2)
    assert done.returncode == 1 and "ValueError: rank 1 is broken" in done.stdout
    assert time.monotonic() - started < 60 and not psutil.pid_exists(int((tmp_path / "0").read_text()))


def test_a_launch_that_hangs_is_killed_and_said(script, tmp_path):
    with pytest.raises(AssertionError, match="took longer than 5 s"):
        warm(script, tmp_path, "hang", ranks=2, timeout_s=5)
    assert not any(psutil.pid_exists(int((tmp_path / rank).read_text())) for rank in "01")
    assert warm(script, tmp_path, "end", ranks=1).returncode == 0, "the next launch starts as if nothing had been"
