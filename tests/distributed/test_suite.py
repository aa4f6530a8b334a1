"""A suite on two real ranks: killed in the middle it goes on, and its numbers are those of one process."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dsclip.convert import export_hf
from dsclip.evaluate.cli import _parser, evaluate
from tests.test_convert import checkpoint_of, perturbed, small

REPOSITORY = Path(__file__).parent.parent.parent
SUITE = """
entries:
  - {name: first, task: zeroshot, data: demo:val}
  - {name: second, task: retrieval, data: demo:val, max_samples: 150}
  - {name: third, task: hard_negatives, data: demo:val, max_samples: 100}
"""


def start(model, tmp_path) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "launchers/evaluate.py",
        "--model", model, "--suite", tmp_path / "suite.yaml", "--output", tmp_path / "out", "--json", "--batch-size", "8",
        "--feature-cache", tmp_path / "features",
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def test_a_suite_on_two_ranks_goes_on_where_it_was_killed(demo, tmp_path):
    export_hf(checkpoint_of(perturbed(small("demo")), demo), tmp_path / "hf")
    (tmp_path / "suite.yaml").write_text(SUITE)
    killed = start(tmp_path / "hf", tmp_path)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "out").glob("entries/first-*.json")) and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = psutil.Process(killed.pid).children(recursive=True)  # each in a session of its own
    for process in (*ranks, killed):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    killed.communicate()
    assert not (tmp_path / "out" / "results.json").exists(), "it was killed before its end"

    whole = start(tmp_path / "hf", tmp_path)
    out, err = whole.communicate(timeout=240)
    assert whole.returncode == 0, err
    entries = json.loads(out)["entries"]
    assert [e["state"] for e in entries][0] == "kept" and {e["state"] for e in entries} <= {"kept", "done"}
    assert sorted(p.name for p in (tmp_path / "features").iterdir()) and not list(tmp_path.rglob("*.tmp"))
    for entry, more in zip(entries, ([], ["--max-samples", "150"], ["--max-samples", "100"]), strict=True):
        alone = evaluate(_parser().parse_args([
            "--model", str(tmp_path / "hf"), "--task", entry["task"], "--data", "demo:val", "--batch-size", "8", *more
        ]))  # fmt: skip
        for name, value in alone["metrics"].items():
            # Confidences are float32 products, whose last bit depends on where their tensors lie in memory.
            expected = pytest.approx(value, abs=3e-3) if name.startswith("calibration") else value
            assert entry["metrics"][name] == expected, name
