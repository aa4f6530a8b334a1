"""Failures: the formula against a simulation that plays them one by one, the best interval against a search, the command."""

import json
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.plan.reliability import GPU_HOURS_A_FAILURE, Failures
from tests.programs import run_program

HOUR = 3600.0


@settings(deadline=None, max_examples=25)
@given(
    between=st.floats(0.3, 30),
    stall=st.floats(0.1, 60),
    background=st.floats(0, 300),
    restart=st.floats(1, 900),
    interval=st.floats(300, 3000),
)
def test_runs_with_failures_at_random_moments_have_the_ratio_of_the_formula(
    between, stall, background, restart, interval
):
    job = Failures(between * HOUR, stall, stall + background, restart)
    steps = 300 * interval * math.ceil(10 * between * HOUR / interval)  # so many that the unsaved end doesn't matter
    found = [job.simulated(interval, steps, seed) for seed in range(8)]
    error = statistics.stdev(found) / math.sqrt(len(found))
    assert abs(statistics.fmean(found) - job.ettr(interval)) < 6 * error + 1e-3


def test_without_background_it_is_dalys_formula():
    job = Failures(2 * HOUR, 20, 20, 120)
    interval, m = 600, 2 * HOUR
    expected = (
        m * math.exp(120 / m) * (math.exp((interval + 20) / m) - 1)
    )  # seconds to save `interval` seconds of steps
    assert job.ettr(interval) == pytest.approx(interval / expected, rel=1e-12)


@settings(deadline=None)
@given(between=st.floats(0.1, 100), stall=st.floats(0.01, 100), restart=st.floats(1, 900))
def test_no_interval_is_better_than_the_best(between, stall, restart):
    job = Failures(between * HOUR, stall, stall, restart)
    best = job.best_interval_s()
    assert all(job.ettr(best) >= job.ettr(best * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2))
    assert best == pytest.approx(
        math.sqrt(2 * stall * between * HOUR), rel=0.5 * math.sqrt(stall / (between * HOUR)) + 0.01
    )


def test_one_save_is_in_flight_at_a_time():
    assert Failures(HOUR, 0.1, 300, 60).best_interval_s() == pytest.approx(299.9)


def plan(*options):
    done = run_program("tools/plan.py", "--reliability", "--json", *options)
    return json.loads(done.stdout), done.returncode


def test_the_command_takes_the_rate_of_llama_3_by_the_number_of_gpus():
    found, code = plan("--gpus", "512", "--save-seconds", "2", "--restart-seconds", "120")
    assert code == 0 and found["mtbf_hours"] == pytest.approx(GPU_HOURS_A_FAILURE / 512)
    assert found["ettr"] == max(row["ettr"] for row in found["intervals"])
    assert found["ettr_90"][0] < found["ettr"] < found["ettr_90"][1]
    faster, _ = plan("--gpus", "512", "--save-seconds", "2", "--restart-seconds", "120", "--mtbf-hours", "2.8")
    assert faster["ettr"] < found["ettr"] and faster["save_interval_seconds"] < found["save_interval_seconds"]


def test_times_come_from_a_run(tmp_path):
    lines = [{"step": 1, "start_seconds": 30.0}, {"step": 5, "save_seconds": 2.0}, {"step": 9, "save_seconds": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    found, _ = plan("--run", tmp_path)
    assert (found["save_seconds"], found["restart_seconds"]) == (3.0, 30.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--reliability needs --save-seconds and --restart-seconds, or --run"),
        (["--save-seconds", "2", "--restart-seconds", "0"], "--restart-seconds is 0.0; it must be greater than 0"),
        (
            ["--save-seconds", "2", "--restart-seconds", "9", "--write-seconds", "1"],
            "--write-seconds is 1.0, less than",
        ),
        (
            ["--save-seconds", "20000", "--restart-seconds", "120", "--mtbf-hours", "0.1"],
            "such a job makes no progress",
        ),
        (["--save-seconds", "2", "--restart-seconds", "2", "--mtbf-hours", "1e-4"], "such a job makes no progress"),
        (["--run", "/nowhere"], "--run /nowhere: there is no metrics.jsonl in it"),
    ],
)
def test_what_is_missing_or_wrong_is_said(options, message):
    found, code = plan(*options)
    assert code == 2 and found["error"].startswith(message)


def test_options_of_failures_are_refused_where_nobody_asks_about_them():
    done = run_program("tools/plan.py", "--gpu", "H100", "--save-seconds", "3", "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["error"].startswith(
        "--save-seconds belongs to --reliability"
    )
