"""Sweeps: real runs of a grid, stopped and continued; runs that diverged; learning rates that are transferred."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from dsclip.checkpoint.manifest import MANIFEST
from dsclip.config import load_grid
from dsclip.errors import UserError
from dsclip.scaling.points import Point, read_csv
from dsclip.scaling.runs import divergence, gmacs_per_sample, read_runs
from dsclip.scaling.sweep import Sweep
from dsclip.scaling.transfer import best_rate, transferred
from tests.programs import ROOT, run_program

GRID = """
name: tiny
recipe:
  model: {preset: demo, vision_width: 32, vision_heads: 1, vision_mlp_width: 64, vision_layers: 1,
          text_width: 32, text_heads: 1, text_mlp_width: 64, text_layers: 1}
  data: {tokenizer: demo, workers: 0}
  batch: {global_batch_size: 16}
  optim: {warmup_steps: 0}
  train: {log_every: 1, save_every: 1, keep_checkpoints: 99, export_hf: false, output: OUTPUT}
  eval: {batch_size: 32, max_samples: 32, zeroshot_shards: demo:val}
axes:
  model:
    calm: {optim.lr: 1e-3}
    wild: {optim.lr: 1e30}
  samples: {s: {samples_seen: 320, demo_samples: 64}}
"""
WIDTHS = """
name: widths
recipe: {model: {preset: demo}, optim: {warmup_steps: 0}}
learning_rate: RULE
axes:
  model:
    w64: {model.vision_width: 64, model.vision_heads: 2}
    w128: {}
"""


def write_grid(folder, text=GRID):
    folder.mkdir(exist_ok=True)
    (folder / "grid.yaml").write_text(text.replace("OUTPUT", str(folder / "runs")))
    return folder / "grid.yaml"


def sweep(grid, *options):
    done = run_program("tools/sweep.py", grid, "--launch", sys.executable, *options, "--json")
    return json.loads(done.stdout), done


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A sweep that was killed within its first run and continued; {run: state} and the folder."""
    grid = write_grid(tmp_path_factory.mktemp("sweep") / "stopped")
    command = [sys.executable, "tools/sweep.py", str(grid), "--launch", sys.executable]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    runs = grid.parent / "runs"
    deadline = time.monotonic() + 300
    while not (runs / "calm_s" / "checkpoints" / "step_00000002" / MANIFEST).is_file():
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be stopped"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killed_before_its_end = not (runs / "calm_s" / "summary.json").is_file()
    result, done = sweep(grid)
    return {r["run"]: r for r in result["runs"]}, runs, done, killed_before_its_end, grid


def test_a_sweep_that_was_killed_goes_on_and_gives_the_table_of_one_that_was_not(stopped, tmp_path):
    states, runs, done, killed, _ = stopped
    assert killed and states["calm_s"]["status"] == "done"
    assert "run 1 of 2: calm_s (begun)" in done.stderr
    assert json.loads((runs / "calm_s" / "summary.json").read_text())["resumes"]
    sweep(write_grid(tmp_path / "whole"), "--only", "1")
    rows = [(tmp_path / "whole" / "runs" / "points.csv").read_text(), (runs / "points.csv").read_text()]
    assert len({text.splitlines()[0] for text in rows}) == 1
    assert len({text.splitlines()[1] for text in rows}) == 1 and "calm_s,done" in rows[0]


def test_a_run_that_diverged_is_marked_and_no_point(stopped):
    states, runs, _, _, grid = stopped
    assert (states["wild_s"]["status"], states["wild_s"]["reason"]) == ("diverged", "its loss is not finite at step 11")
    table = read_csv(runs / "points.csv")
    assert {p.run for p in table.points} == {"calm_s"} and {p.data_samples for p in table.points} == {64}
    assert [(left.run, left.reason) for left in table.left_out] == [("wild_s", "its loss is not finite at step 11")]
    folders = read_runs(runs)
    assert {p.error for p in folders.points} == {p.error for p in table.points}
    assert [left.run for left in folders.left_out] == ["wild_s"]
    # And nothing is left to do.
    before = (runs / "points.csv").read_bytes()
    again, done = sweep(grid)
    assert "run 1 of 2" not in done.stderr and (runs / "points.csv").read_bytes() == before


def test_a_changed_grid_does_not_continue_runs_that_have_begun(stopped):
    *_, grid = stopped
    other = write_grid(grid.parent, GRID.replace("1e-3", "2e-3"))
    result, done = sweep(other)
    assert done.returncode == 2 and "has begun with other values: optim.lr 0.001 → 0.002" in result["error"]
    write_grid(grid.parent)


def test_a_stopped_sweep_waits_for_its_run_and_leaves_none_behind(tmp_path):
    """The run here is a shell that takes a second to end: the sweep's own part, without a training."""
    grid = write_grid(tmp_path)
    (tmp_path / "launch.sh").write_text(
        "trap 'sleep 1; touch $HERE/saved; exit 75' TERM\ntouch $HERE/up\nwhile :; do sleep 0.1; done\n"
    )
    process = subprocess.Popen(
        [sys.executable, "tools/sweep.py", str(grid), "--launch", f"bash {tmp_path}/launch.sh", "--only", "2", "--json"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "HERE": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (tmp_path / "up").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert (tmp_path / "saved").exists() and process.returncode == 75
    assert "wild_s was stopped; the same command goes on with it" in json.loads(out)["error"]


def test_a_job_array_has_a_task_for_each_run(tmp_path):
    grid = write_grid(tmp_path)
    sweep(grid, "--slurm", tmp_path / "array.sbatch", "--at-a-time", "3")
    script = (tmp_path / "array.sbatch").read_text()
    assert "#SBATCH --array=1-2%3" in script and '--only "$SLURM_ARRAY_TASK_ID"' in script
    assert "exec bash launchers/requeue.sh python tools/sweep.py" in script  # what tests/cluster runs
    assert subprocess.run(["bash", "-n", tmp_path / "array.sbatch"]).returncode == 0
    assert [run["status"] for run in sweep(grid, "--list")[0]["runs"]] == ["open", "open"]


def test_wrong_options_end_in_one_sentence(tmp_path):
    grid = write_grid(tmp_path)
    for options, message in ((["--only", "3"], "has 2 runs"), (["--max-runs", "0"], "it must be at least 1")):
        result, done = sweep(grid, *options)
        assert done.returncode == 2 and message in result["error"]


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([2.8, 2.4, 1.9, 1.5], None),
        ([2.8, 2.77, 2.76, 2.75], None),  # too short to learn
        ([2.9, 2.0, 1.5, 2.77, 2.77, 2.77, 2.77, 2.77], "its loss fell to 1.500 and is 2.770 at step 8; 2.773 is that of guessing"),
        ([2.8, 2.8, 3.9, 4.0, 4.1, 4.1, 4.1], "its loss rose from 2.800 to 4.100 at step 7; 2.773 is that of guessing"),
        ([2.8, 2.0, None], "its loss is not finite at step 3"),
    ],
)  # fmt: skip
def test_divergence_is_told_from_learning_little(tmp_path, losses, reason):
    (tmp_path / "config.yaml").write_text("batch: {global_batch_size: 16}")
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert divergence(tmp_path) == reason


def widths(tmp_path, rule):
    return load_grid(str(write_grid(tmp_path, WIDTHS.replace("RULE", rule))))


def test_learning_rates_follow_the_width(tmp_path):
    found = transferred(widths(tmp_path, "{rule: width, lr: 2e-3, width: 128}"))
    assert [run.recipe.optim.lr for run in found.runs] == [4e-3, 2e-3]
    root = transferred(widths(tmp_path, "{rule: width, lr: 2e-3, width: 128, exponent: -0.5}"))
    assert [run.recipe.optim.lr for run in root.runs] == [2.83e-3, 2e-3]


def test_learning_rates_follow_what_was_measured_at_smaller_sizes(tmp_path):
    lines = ["arch,samples_seen,gmacs_per_sample,test_data,lr,error"]
    for gmacs in (0.001, 0.004):
        best = 1e-3 * (gmacs / 0.001) ** -0.25
        for lr in (best / 4, best / 2, best, 2 * best, 4 * best):
            lines.append(f"m,1e6,{gmacs},t,{lr},{0.3 * math.exp(0.05 * math.log(lr / best) ** 2)}")
    (tmp_path / "lr.csv").write_text("\n".join(lines))
    found = transferred(widths(tmp_path, f"{{rule: measured, points: {tmp_path}/lr.csv}}"))
    for run in found.runs:
        expected = 1e-3 * (gmacs_per_sample(run.recipe) / 0.001) ** -0.25
        assert run.recipe.optim.lr == pytest.approx(expected, rel=0.01)


def test_the_best_rate_is_the_bottom_of_a_parabola_or_the_best_there_is():
    def runs(pairs):
        return [Point("f", "t", "m", 1.0, error, lr=lr) for lr, error in pairs]

    def bowl(lr):
        return math.exp(0.1 * math.log(lr / 1.3e-3) ** 2)

    assert best_rate(runs([(lr, bowl(lr)) for lr in (5e-4, 1e-3, 2e-3)])) == pytest.approx(1.3e-3, rel=1e-6)
    assert best_rate(runs([(1e-3, 0.5), (2e-3, 0.4), (4e-3, 0.3)])) == 4e-3


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{rule: depth}", "choose from width, measured"),
        ("{rule: width, lr: 1e-3}", "needs `width`"),
        ("{rule: width, lr: 1e-3, width: 128, exponet: 1}", "Did you mean `exponent`?"),
        ("{rule: width, lr: fast, width: 128}", "it must be a number"),
        ("{rule: measured, points: published}", "set `metric` and `task`"),
    ],
)
def test_a_rule_that_can_not_be_obeyed_is_refused(tmp_path, rule, message):
    with pytest.raises(UserError) as error:
        transferred(widths(tmp_path, rule))
    assert message in str(error.value)


def test_a_rule_and_a_rate_of_ones_own_contradict_each_other(tmp_path):
    text = WIDTHS.replace("RULE", "{rule: width, lr: 1e-3, width: 128}").replace("w128: {}", "w128: {optim.lr: 1e-3}")
    with pytest.raises(UserError, match="run w128 sets optim.lr, and so does `learning_rate`"):
        transferred(load_grid(str(write_grid(tmp_path, text))))


def test_runs_of_one_grid_have_one_folder(tmp_path):
    text = WIDTHS.replace("learning_rate: RULE\n", "").replace("w128: {}", "w128: {train.output: elsewhere}")
    with pytest.raises(UserError, match="different `train.output`"):
        Sweep(load_grid(str(write_grid(tmp_path, text))))
