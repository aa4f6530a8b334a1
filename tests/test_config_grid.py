"""Grids: one file for many recipes. The packaged ones hold what was published, and every run of theirs is a recipe that fits."""

import csv
from importlib import resources

import pytest

from dsclip.config import load_grid, load_recipe, packaged_grids, packaged_recipes
from dsclip.config.grid import expand
from dsclip.errors import UserError
from dsclip.model.flops import forward_flops
from dsclip.scaling.runs import model_of
from tests.programs import run_program

AXES = {"size": {"a": {"model.vision_layers": 1}, "b": {"optim.lr": 1e-4}}, "seen": {"s": {"samples_seen": 1000}}}
SHARED = {"optim": {"warmup_steps": 0}, "batch": {"global_batch_size": 100}}


def grid(**keys):
    return {"name": "g", "recipe": SHARED, "axes": AXES} | keys


def test_a_run_is_the_shared_recipe_with_its_choices():
    found = expand(grid(where=[{"size": "b", "train.seed": 7}]), "g.yaml")
    assert [run.name for run in found.runs] == ["a_s", "b_s"]
    a, b = (run.recipe for run in found.runs)
    assert (a.model.vision_layers, a.train.seed, a.optim.lr) == (1, 0, 5e-4)
    assert (b.model.vision_layers, b.train.seed, b.optim.lr) == (None, 7, 1e-4)
    assert a.train.steps == 10 and (a.train.output, a.train.name) == ("runs/g", "a_s")
    assert found.runs[1].choices == {"size": "b", "seen": "s"} and found.runs[1].sets_lr and not found.runs[0].sets_lr


def test_runs_are_those_that_are_listed_or_left():
    listed = expand(grid(runs=[{"size": "b", "seen": "s", "samples_seen": 5000, "demo_samples": 300}]), "g.yaml")
    assert [(r.name, r.recipe.train.steps, r.demo_samples) for r in listed.runs] == [("b_s", 50, 300)]
    left = expand(grid(where=[{"size": "b", "skip": True}]), "g.yaml")
    assert [run.name for run in left.runs] == ["a_s"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "g"}, "is no grid"),
        (grid(axis={}), "Did you mean `axes`?"),
        (grid(name=""), "give the grid a `name`"),
        (grid(axes={"size": {}}), "axis `size` has no choices"),
        (grid(axes={"size": {"a": 3}}), "size a is 3"),
        (grid(where=[{"size": "c"}]), "size has no choice `c`"),
        (grid(runs=[{"size": "a"}]), "has no `seen`; a run needs a choice of every axis"),
        (grid(runs=[], where=[]), "give one of them"),
        (grid(runs=[{"size": "a", "seen": "s"}] * 2), "run a_s stands there twice"),
        (grid(where=[{"seen": "s", "skip": True}]), "no runs are left"),
        (grid(where=[{"seen": "s", "optim.lrr": 1}]), "run a_s: unknown key `optim.lrr`. Did you mean `lr`?"),
        (grid(where=[{"seen": "s", "lr": 1}]), "`lr` is no key of a recipe"),
        (grid(where=[{"seen": "s", "samples_seen": "many"}]), "`samples_seen` is 'many'"),
        (grid(learning_rate=3), "give a rule"),
    ],
)
def test_a_grid_that_can_not_be_obeyed_is_refused_with_the_reason(tree, message):
    with pytest.raises(UserError) as error:
        expand(tree, "g.yaml")
    assert message in str(error.value) and "g.yaml" in str(error.value)


@pytest.mark.parametrize("name", packaged_grids())
def test_every_run_of_a_packaged_grid_is_a_recipe(name):
    runs = load_grid(name).runs
    assert runs and not set(packaged_recipes()) & set(packaged_grids())
    last = runs[-1]
    recipe = load_recipe(f"{name}/{last.name}", ["train.seed=3"])
    assert recipe.train.seed == 3 and recipe.model == last.recipe.model and recipe.optim == last.recipe.optim


def test_the_study_of_2023_has_the_samples_and_models_of_its_results():
    text = (resources.files("dsclip.scaling") / "published.csv").read_text(encoding="utf-8")
    rows = [
        r for r in csv.DictReader(text.splitlines()) if r["family"] == "openclip" and r["test_data"] == "imagenet1k"
    ]
    trained = {(r["arch"], r["train_data"], float(r["gmacs_per_sample"])): set() for r in rows}
    for r in rows:
        trained[r["arch"], r["train_data"], float(r["gmacs_per_sample"])].add(float(r["samples_seen"]))
    runs = load_grid("laion2023").runs
    assert len(runs) == len(rows) == 29
    for run in runs:
        (gmacs,) = {g for arch, _, g in trained if arch == run.recipe.model.preset}
        seen = trained[run.recipe.model.preset, f"LAION-{run.choices['data']}", gmacs]
        steps = run.recipe.train.steps * run.recipe.batch.global_batch_size
        assert any(steps == pytest.approx(s, rel=1e-4) for s in seen), run.name
        assert sum(forward_flops(model_of(run.recipe))) / 2e9 == pytest.approx(gmacs, rel=0.01)
    batches = {run.name: run.recipe.batch.global_batch_size for run in runs}
    assert (batches["B-32_2B_34B"], batches["H-14_2B_34B"], batches["L-14_2B_34B"]) == (79104, 79104, 86016)
    rates = {run.name: (run.recipe.optim.lr, run.recipe.optim.warmup_steps) for run in runs}
    assert rates["H-14_2B_34B"] == (5e-4, 2000) and rates["B-16_2B_34B"] == (1e-3, 10000)


def test_the_grid_of_2025_has_its_sizes():
    runs = load_grid("laion2025").runs
    assert len(runs) == 15 * 3 * 11
    gmacs = {run.choices["model"]: sum(forward_flops(model_of(run.recipe))) / 2e9 for run in runs}
    published = {"S-32": 2.84, "S-16": 6.3, "M-32": 4.98, "M-16": 10.99, "B-32": 7.4, "L-16": 68.26, "H-16": 150.96}
    assert {name: gmacs[name] for name in published} == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    "run",
    ["laion2023/B-32_80M_3B", "laion2023/B-16_400M_13B", "laion2023/L-14_2B_34B", "laion2023/H-14_2B_34B", "laion2023/g-14_2B_13B",
     "laion2025/M-14_DFN-1.4B_3B", "demo_study/w64_demo-8K_57K"],
)  # fmt: skip
def test_a_run_of_a_grid_starts_with_data_that_is_there(run, tmp_path):
    """The published recipes' data and batches don't fit a test: the demo's data, and eight samples."""
    here = [
        "data.train_shards=demo",
        "data.tokenizer=demo",
        "batch.global_batch_size=8",
        "data.workers=0",
        f"train.output={tmp_path}",
    ]
    done = run_program("launchers/train.py", "--config", run, "--dry-run", *here)
    assert done.returncode == 0 and "The settings fit together" in done.stdout, done.stderr


def test_an_unknown_run_or_grid_is_said():
    with pytest.raises(UserError, match="grid laion2023 has no run `B-32_2B_35B`. Did you mean `B-32_2B_3B`"):
        load_recipe("laion2023/B-32_2B_35B")
    with pytest.raises(UserError, match="laion2023"):
        load_grid("laion2022")
