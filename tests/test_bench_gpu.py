"""The GPU bench with tiny shapes on a CPU: every phase yields its rows, deadlines lose no row, lines are judged."""

import contextlib
import importlib
import json
import math

import pytest
import torch

from dsclip.bench.gpu.phases.profile import covered
from dsclip.bench.gpu.report import as_json, as_markdown
from dsclip.bench.gpu.row import Row, Settings
from dsclip.bench.gpu.runner import Outcome, run_phases
from dsclip.bench.gpu.schedule import PHASES, TINY, Phase
from tests.distributed.launch import alone
from tests.programs import run_program

# Of each module: a part of the name of a row that it must measure, on a CPU too.
MEASURED = {
    "exact": "ZeRO-3, fp32", "steps": "whole contexts", "block": "dsclip eager, full", "memory": "planned against measured",
    "peers": "dsclip / best peer", "profile": "CPU a block", "attention": "causal", "data": "a core",
}  # fmt: skip


@pytest.mark.parametrize("module", MEASURED)
def test_a_phase_measures_tiny_shapes_and_is_exact(module, demo):
    options = next(phase.options for phase in TINY if phase.module == module)
    measure = importlib.import_module(f"dsclip.bench.gpu.phases.{module}").measure
    with alone() if module in ("exact", "steps", "memory", "peers", "profile") else contextlib.nullcontext():
        found = list(measure(Settings("cpu", True, options)))
    rows = [row for row in found if isinstance(row, Row)]
    assert any(MEASURED[module] in row.name and row.value is not None for row in rows)
    assert all(row.value is None or math.isfinite(row.value) for row in rows)
    assert all(row.note for row in rows if row.value is None), "what isn't measured says why"
    assert not [row for row in rows if row.met("cpu") is False]
    json.dumps(found, default=vars)


def test_the_tool_writes_table_json_and_log(tmp_path):
    out = tmp_path / "found" / "today.md"
    done = run_program("tools/bench_gpu.py", *"--device cpu --tiny --only env loss --json --out".split(), out)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(out.with_suffix(".json").read_text()) and not result["missed"] + result["failed"]
    assert [phase["phase"] for phase in result["phases"]] == ["env", "loss"]
    assert all(phase["status"] == "done" for phase in result["phases"])
    page = out.read_text()
    assert "| N = 512: loss against dense |" in page and "| not installed |" in page and "tiny" in page
    assert all(f"| N = 512, d = 64, tiled {precision} |" in page for precision in ("plain", "tf32", "split", "bf16"))
    assert "== loss" in out.with_suffix(".log").read_text()


def test_every_phase_of_the_tiny_run_is_tested_here():
    assert {phase.module for phase in TINY} == {phase.module for phase in PHASES} == {*MEASURED, "env", "loss", "train"}


def test_a_phase_that_hangs_or_fails_loses_neither_its_rows_nor_the_other_phases(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(STAND_INS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    phases = [Phase("hangs", "hangs", 12), Phase("fails", "fails", 60), Phase("works", "works", 60)]
    reports, log = [], (tmp_path / "log").open("w+")
    outcomes = run_phases(phases, "cpu", True, None, log, lambda found: reports.append(len(found)))
    assert [o.status.split(" of ")[0].split(":")[0] for o in outcomes] == [
        "ended at its deadline", "failed with exit code 1", "done",
    ]  # fmt: skip
    assert [[row.value for row in o.rows] for o in outcomes] == [[1.0], [2.0], [3.0]] and reports == [1, 2, 3]
    log.seek(0)
    assert "ZeroDivisionError" in log.read(), "the log has what the phase printed"


STAND_INS = """
import sys, types, time
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.rpartition(".")[2] in ("hangs", "fails", "works") and "phases" in name:
            return ModuleSpec(name, self)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        kind = module.__name__.rpartition(".")[2]
        from dsclip.bench.gpu.row import Row
        def measure(settings):
            yield Row("first", 1.0 + ("hangs", "fails", "works").index(kind))
            if kind == "hangs":
                time.sleep(600)
            if kind == "fails":
                1 / 0
        module.measure = measure

sys.meta_path.insert(0, Finder())
"""


def test_without_time_a_phase_is_left_out_and_said_to_be(tmp_path):
    with (tmp_path / "log").open("w") as log:
        (outcome,) = run_phases(TINY[:1], "cpu", True, 1 / 600, log, lambda _: None)
    assert outcome.status == "left out: no time was left" and not outcome.rows
    assert not as_json([outcome], "cpu", {})["failed"]


def test_lines_are_judged_on_a_gpu_and_exactness_everywhere():
    fast, slow = Row("a", 2.0, accept=1), Row("b", 0.5, accept=1)
    exact = Row("c", 3.0, accept=1, at_most=True, exactness=True)
    assert [row.met("cuda") for row in (fast, slow, exact)] == [True, False, False]
    assert [row.met("cpu") for row in (fast, slow, exact)] == [None, None, False]
    assert Row("d", math.nan, accept=1).met("cuda") is False and Row("e", None, accept=1).met("cuda") is None
    outcomes = [Outcome("p", "done", 1.0, [slow, exact]), Outcome("q", "failed with exit code 1: see the log")]
    result = as_json(outcomes, "cuda", {"date": "d", "card": "c", "command": "x"})
    assert (result["missed"], result["failed"]) == (["p: b", "p: c"], ["q"])
    assert "| b | 0.5 | ≥ 1 |  | **no** |" in as_markdown(result, "log")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--device cpu", "--tiny"), ("--device cpu --tiny --only blok", "Did you mean `block`"), ("--minutes 0 --device cpu --tiny", "--minutes")],
)  # fmt: skip
def test_what_can_not_be_run_is_said(arguments, message):
    done = run_program("tools/bench_gpu.py", *arguments.split(), "--json")
    assert done.returncode == 2 and message in json.loads(done.stdout)["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_else_to_run():
    done = run_program("tools/bench_gpu.py")
    assert done.returncode == 2 and "--device cpu --tiny" in done.stderr


def test_time_that_kernels_cover_counts_overlaps_once():
    assert covered([(0, 2), (1, 3), (5, 6)]) == 4 and covered([(0, 10), (2, 3)]) == 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_tiny_run_passes_on_a_gpu(tmp_path):
    done = run_program("tools/bench_gpu.py", "--tiny", "--json", "--only", "exact", "loss", "--out", tmp_path / "x.md")
    assert "exact" in done.stdout + done.stderr
    assert not json.loads((tmp_path / "x.json").read_text())["failed"]
