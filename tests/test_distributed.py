"""Ranks of SLURM: a task of `srun` becomes the rank that a launcher would have made. tests/cluster/slurm.sh runs it on SLURM itself."""

import os
import subprocess
import sys

import pytest

from dsclip.distributed import slurm_ranks
from dsclip.errors import UserError
from tests.programs import ROOT

# Of `srun -N2 --ntasks-per-node 2`, as SLURM 22.05 sets them.
TASK = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0",
}  # fmt: skip


def test_a_task_of_srun_is_a_rank():
    assert slurm_ranks(TASK) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "11212",
    }  # fmt: skip


def test_what_a_launcher_or_the_user_set_stays():
    assert slurm_ranks(TASK | {"RANK": "0"}) == {}
    assert slurm_ranks(TASK | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}).items() >= {
        ("MASTER_ADDR", "10.0.0.7"), ("MASTER_PORT", "29500"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "environment", [{}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, TASK | {"SLURM_STEP_NUM_TASKS": "1"}]
)
def test_a_batch_script_or_a_shell_is_no_rank(environment):
    assert slurm_ranks(environment) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n7", "n7"),
        ("b2,a1", "b2"),
        ("gpu[007-010,12],x1", "gpu007"),
        ("r[2-3]n[1,4]-ib", "r2n1-ib"),
        ("a,n[1-2]", "a"),
    ],
)
def test_rank_0_is_on_the_first_node(nodes, first):
    assert slurm_ranks(TASK | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_nodes_may_have_different_numbers_of_tasks():
    counts = [slurm_ranks(TASK | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": str(n)}) for n in range(3)]
    assert [c["LOCAL_WORLD_SIZE"] for c in counts] == ["2", "2", "1"]


def test_a_device_bound_to_its_task_is_number_0():
    assert slurm_ranks(TASK | {"CUDA_VISIBLE_DEVICES": "5"})["LOCAL_RANK"] == "0"
    for others in ("0,1", "NoDevFiles", "-1", ""):
        assert slurm_ranks(TASK | {"CUDA_VISIBLE_DEVICES": others})["LOCAL_RANK"] == "1"


def test_steps_at_once_have_ports_of_their_own():
    ports = {
        slurm_ranks(TASK | {"SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)})["MASTER_PORT"]
        for j in range(50)
        for s in range(7)
    }
    assert len(ports) == 350 and all(10000 <= int(port) < 32768 for port in ports)


@pytest.mark.parametrize("change", [{"SLURM_STEP_TASKS_PER_NODE": "many"}, {"SLURM_NODEID": "5"}, {"SLURM_JOB_ID": ""}])
def test_what_cannot_be_read_is_said(change):
    with pytest.raises(UserError, match="one of 4 tasks"):
        slurm_ranks(TASK | change)


def test_tasks_of_one_node_see_each_other():
    """Their environment, as other processes see it, is SLURM's: what they set themselves isn't in it."""
    code = "from dsclip.distributed import take_slurm_ranks\ntake_slurm_ranks()\nfrom dsclip.train.processes import other_ranks\nprint(*other_ranks())"
    one, other_job = (
        TASK | {"SLURM_PROCID": "2", "SLURM_LOCALID": "0"},
        TASK | {"SLURM_PROCID": "0", "SLURM_JOB_ID": "13"},
    )
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")}
    sleepers = [subprocess.Popen(["sleep", "300"], env=base | task) for task in (one, other_job)]
    try:
        done = subprocess.run([sys.executable, "-c", code], env=base | TASK, cwd=ROOT, capture_output=True, text=True)
    finally:
        for process in sleepers:
            process.kill()
            process.wait()
    assert done.stdout.split() == ["2"], done.stderr
