"""launchers/submit.py: the command that it makes, and what it refuses. tests/cluster/slurm.sh submits one to a real SLURM."""

import json
import shlex

import pytest

from dsclip.train.submit import seconds_of
from tests.programs import ROOT, run_program
from tests.test_scaling_sweep import write_grid


def submit(*arguments):
    done = run_program("launchers/submit.py", "--json", *arguments)
    return json.loads(done.stdout), done.returncode


def test_a_recipe_is_a_job_of_the_batch_script(tmp_path):
    recipe = tmp_path / "my.yaml"
    recipe.write_text("train: {steps: 2500}\n")
    shape = ["--nodes", 4, "--ranks-per-node", 2, "--cpus-per-rank", 8, "--time", "1:00:00", "--sbatch=--partition=a b"]
    result, code = submit(*shape, "--print", "--no-check", "--config", recipe, "train.name=x", "--save-seconds", 300)
    assert code == 0 and result["job"] is None
    assert result["command"] == [
        "sbatch", "--parsable", "--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=8", "--time=1:00:00",
        "--signal=USR1@300", "--partition=a b", "launchers/slurm.sbatch", "--ds_config", "zero3_bf16", "--config", str(recipe), "train.name=x",
    ]  # fmt: skip
    plain = run_program("launchers/submit.py", "--print", "--no-check", "--sbatch=--partition=a b")
    assert shlex.split(plain.stdout)[:2] == ["sbatch", "--parsable"] and "'--partition=a b'" in plain.stdout


def test_a_grid_is_a_job_array(tmp_path):
    grid = write_grid(tmp_path)
    result, code = submit("--print", "--grid", grid, "--at-a-time", 1, "--ranks-per-node", 1, "--gpus-per-node", 0)
    assert code == 0 and {"--ntasks-per-node=1", "--gpus-per-node=0"} < set(result["command"])
    script = (tmp_path / "runs" / "array.sbatch").read_text()
    assert result["command"][-1] == str(tmp_path / "runs" / "array.sbatch") and "#SBATCH --array=1-2%1" in script
    line = next(line for line in script.splitlines() if "requeue.sh" in line)
    sweep = ["python", "tools/sweep.py", str(grid), "--launch", "srun python", "--ds_config", "zero3_bf16"]
    assert shlex.split(line) == ["exec", "bash", "launchers/requeue.sh", *sweep, "--only", "$SLURM_ARRAY_TASK_ID"]
    assert (ROOT / "launchers" / "requeue.sh").is_file()


def test_what_the_run_would_refuse_is_refused_before_it_is_queued(demo, tmp_path):
    """A global batch of 32 for 3 · 8 ranks."""
    result, code = submit("--nodes", 3, "--config", "demo", "batch.global_batch_size=32", f"train.output={tmp_path}")
    assert code == 2 and "24" in result["error"] and "--no-check" in result["error"], result


def test_a_time_limit_is_read_as_sbatch_reads_it():
    limits = {"90": 5400, "1:30": 90, "12:00:00": 43200, "2-3": 183600, "2-03:30": 185400, "1-00:00:05": 86405}
    assert {limit: seconds_of(limit) for limit in limits} == limits


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", 0], "--nodes is 0; it must be at least 1"),
        (["--gpus-per-node=-1"], "--gpus-per-node is -1; it must be at least 0"),
        (["--time", "bogus"], "--time is bogus; give minutes"),
        (["--time", "0:30"], "--time is 0:30, 30 s, and the run is told to save 120 s before that"),
        (["--grid", "demo_study", "train.steps=3"], "leave out --config and overrides"),
        (["--no-check"], "there is no `sbatch` here"),
    ],
)
def test_wrong_options_are_one_sentence(options, words, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    result, code = submit(*options)
    assert code == 2 and words in result["error"]
