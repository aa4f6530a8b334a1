"""Ranks of SLURM: a task of `srun` becomes the rank that a launcher would have made. tests/cluster/slurm.sh runs it on SLURM itself."""

import os
import socket
import subprocess
import sys

import pytest

from dsclip.distributed import _comparable, check_one_job, slurm_ranks
from dsclip.errors import UserError
from tests.programs import ROOT
from tests.thread_ranks import ThreadRanks

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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE is many"),
        ({"SLURM_NODEID": "5"}, r"SLURM_NODEID is 5, SLURM_STEP_NODELIST is n\[1-2\]"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set"),
        ({"SLURM_LOCALID": None}, "SLURM_LOCALID is not set"),
        ({"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST is not set"),
    ],
)
def test_what_cannot_be_read_is_said(change, words):
    with pytest.raises(UserError, match=f"one of 4 tasks.*{words}") as error:
        slurm_ranks({k: v for k, v in (TASK | change).items() if v is not None})
    assert "Error(" not in str(error.value)


def test_independent_tasks_of_one_srun_are_no_job(tmp_path):
    """Two evaluations, a model each, as `srun --multi-prog` starts them: neither may be credited with the other's."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    step = TASK | {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "n1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
    }
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "launchers/evaluate.py", "--task", "zeroshot", "--data", "demo:val", "--model"]
    tasks = [
        subprocess.Popen(
            [*command, f"{tmp_path}/model{i}"], cwd=ROOT, text=True, stderr=subprocess.PIPE,
            env=base | step | address | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        )
        for i in range(2)
    ]  # fmt: skip
    said = [task.communicate(timeout=120)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [2, 2], said
    assert f"rank 0 was started with `--model {tmp_path}/model0` and rank 1 `--model {tmp_path}/model1`" in said[0]
    assert "start each with `env -u SLURM_STEP_NUM_TASKS" in said[0] and "Traceback" not in "".join(said)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["lr: 1\n  steps: 10", "lr: 1\n  steps: 20"], "rank 0 read the setting `steps: 10` and rank 1 `steps: 20`"),
        (["lr: 1", "lr: 1", "lr: 1\nsteps: 20"], "rank 0 read the setting nothing more and rank 2 `steps: 20`"),
        (["lr: 1", "lr: 1"], None),
    ],
)
def test_ranks_that_read_different_settings_are_no_job(settings, words):
    def complaint(group):
        try:
            check_one_job(group, settings[group.rank])
        except UserError as error:
            return str(error)

    for said in ThreadRanks(len(settings)).run(complaint):
        assert said is words is None or words in said


def test_the_order_of_overrides_and_the_number_of_a_rank_make_no_other_job():
    one = ["--local_rank=0", "--config", "demo", "train.steps=3", "optim.lr=1e-3"]
    other = ["--config", "demo", "optim.lr=1e-3", "train.steps=3", "--local_rank=1"]
    assert _comparable(one) == _comparable(other) != _comparable([*one, "train.steps=4"])
    assert _comparable(["--model", "a", "--data", "b"]) != _comparable(["--model", "b", "--data", "a"])


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
