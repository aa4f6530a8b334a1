"""A run whose terminal or `tee` ends before it does."""

import subprocess
import sys

SCRIPT = """
import sys
from dsclip.train.lost_reader import outlive_readers

outlive_readers()
print("begun", file=sys.stderr, flush=True)
sys.stdin.readline()
for step in range(20000):  # more than a pipe and Python's buffer hold
    print("step", step)
    print("step", step, file=sys.stderr, flush=True)
with open(sys.argv[1], "w") as done:
    done.write("done")
"""


def test_a_process_goes_on_when_nobody_reads_its_lines_any_more(tmp_path):
    pipe, popen = subprocess.PIPE, subprocess.Popen
    with popen([sys.executable, "-c", SCRIPT, str(tmp_path / "done")], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stderr.readline() == b"begun\n"
        process.stdout.close()
        process.stderr.close()
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait(60) == 0
    assert (tmp_path / "done").read_text() == "done"


def test_a_full_disk_under_a_log_is_no_lost_reader():
    """Lines that could not be written are an error as before."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", SCRIPT, "/dev/null"], stdin=subprocess.DEVNULL, stdout=full)
    assert done.returncode != 0
