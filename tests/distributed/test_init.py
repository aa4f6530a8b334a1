"""`model.init` is read by rank 0 alone: all ranks start with its weights, or all end with its sentence."""

import json

import pytest

from tests.distributed.launch import WORKERS, run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    run_ranks(WORKERS / "init_worker.py", 2, folder / "results.json", folder)
    return json.loads((folder / "results.json").read_text())


def test_rank_0_reads_and_every_rank_has_its_weights_in_every_stage(results):
    assert [r["read"] for r in results] == [True, False]
    assert [r["stages"] for r in results] == [[True] * 3] * 2


def test_what_rank_0_finds_wrong_ends_every_rank_with_one_sentence(results):
    for key, words in (("missing", "no such file"), ("damaged", "is damaged")):
        sentences = {r[key] for r in results}
        assert len(sentences) == 1 and words in sentences.pop()


SCRIPT = """
import os
from pathlib import Path
from dsclip.distributed import Collectives, shutdown_distributed
from dsclip.engine.build import init_distributed

init_distributed()
group = Collectives.current()
group.barrier()
print([p.name for p in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")])
shutdown_distributed()
"""


def test_deepspeed_makes_no_shared_memory(tmp_path):
    """It would cost 69 MB a rank, outlive the run, and be compiled first."""
    (tmp_path / "script.py").write_text(SCRIPT)
    printed = run_ranks(tmp_path / "script.py", 2).stdout
    assert printed.replace("\n", "").endswith("[][]"), printed  # the ranks' lines may run into each other
