"""Entries of a suite that fine-tune the model first: a real run, measured as the run itself is, begun once."""

import json
from pathlib import Path

import pytest

from dsclip.config import load_recipe, packaged_recipes
from dsclip.errors import UserError
from dsclip.evaluate import cli
from dsclip.evaluate.suites.suite import load_suite
from dsclip.evaluate.suites.trainings import Trainings
from tests.test_evaluate_suite import model, run, write_set, write_suite  # noqa: F401
from tests.thread_ranks import ThreadRanks

RECIPE = """
model: {lock: text}
data: {workers: 0, templates: simple}
batch: {global_batch_size: 8}
loss: {duplicates: positive}
optim: {lr: 1e-2, warmup_steps: 1}
train: {steps: 6, save_every: null}
eval: {every_steps: null, zeroshot_shards: null, retrieval_shards: null, hard_negatives_shards: null}
"""
ENTRIES = """
entries:
  - {name: as it is, task: zeroshot, data: labelled, groups: [both]}
  - {name: tuned, task: zeroshot, data: labelled, groups: [both], fine_tune: {config: tune.yaml, train: more, set: [train.seed=1]}}
  - {name: gone, task: zeroshot, data: nowhere, fine_tune: {config: tune.yaml, train: more}}
  - {name: untrained, task: zeroshot, data: labelled, fine_tune: {config: tune.yaml, train: nowhere}}
"""


@pytest.fixture
def suite(tmp_path):
    write_set(tmp_path / "data" / "labelled")
    write_set(tmp_path / "data" / "more", samples=24)
    (tmp_path / "tune.yaml").write_text(RECIPE)
    return write_suite(tmp_path, ENTRIES)


def test_an_entry_is_measured_after_a_run_that_is_made_once(suite, tmp_path, model, capsys):  # noqa: F811
    result = json.loads(run(tmp_path, model, capsys, "--json").out)
    plain, tuned, *absent = result["entries"]
    assert [plain["state"], tuned["state"], *(e["state"] for e in absent)] == ["done", "done", "missing", "missing"]
    assert absent[1]["reason"] == f"no training shards in {tmp_path / 'data' / 'nowhere'}"
    trained = Path(tuned["fine_tuned"]["run"])
    assert trained.parent == tmp_path / "out" / "fine_tuned" and tuned["fine_tuned"]["set"] == ["train.seed=1"]
    summary = trained / "summary.json"
    assert json.loads(summary.read_text())["steps"] == 6
    alone = cli.evaluate(cli._parser().parse_args([
        "--model", str(trained), "--task", "zeroshot", "--data", str(tmp_path / "data" / "labelled"), "--batch-size", "4"
    ]))  # fmt: skip
    assert tuned["metrics"] == alone["metrics"]
    assert "fine_tuned" not in plain and plain["metrics"] != tuned["metrics"]
    before = summary.stat().st_mtime_ns
    again = run(tmp_path, model, capsys)
    assert "zeroshot, fine-tuned" in again.out and "both (2 of 2)" in again.out
    assert summary.stat().st_mtime_ns == before and "fine-tunes the model" not in again.err


def test_a_training_that_fails_ends_no_other_entry(suite, tmp_path, model, capsys):  # noqa: F811
    shown = run(tmp_path, model, capsys, "--json", "--launch", "false", code=1)
    states = {entry["name"]: (entry["state"], entry.get("reason")) for entry in json.loads(shown.out)["entries"]}
    assert states["as it is"][0] == "done"
    assert states["tuned"] == ("failed", "its fine-tuning ended with exit code 1; the lines above say why")


def test_several_ranks_and_what_cannot_be_trained_leave_it_out(suite, tmp_path):
    entry = load_suite(str(suite)).entries[1]

    def measured(impossible, group):
        trainings = Trainings("model", None, "weights", ["false"], "zero1_bf16", impossible, None)
        place = type("Place", (), {"folder": tmp_path, "data_root": tmp_path / "data"})
        group.broadcast_object = lambda value: value
        return trainings.measured(entry, entry.fine_tune, load_suite(str(suite)), group, place)

    rows = ThreadRanks(2).run(lambda group: measured(None, group))
    assert {row["state"] for row in rows} == {"unsupported"} and "the same command in one process" in rows[0]["reason"]
    [row] = ThreadRanks(1).run(lambda group: measured("no gradient", group))
    assert (row["state"], row["reason"]) == ("unsupported", "no gradient")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("tune.yaml", "`fine_tune` is 'tune.yaml'; it must be {config: RECIPE, train: SHARDS"),
        ("{config: a, train: b, sets: []}", "has no key `sets`. Did you mean `set`"),
        ("{config: a}", "`fine_tune` needs `train`, a text"),
        ("{config: a, train: b, set: [optim.lr]}", "`set` is .'optim.lr'.; it must be a list of KEY=VALUE"),
        ("{config: a, train: b, set: [model.init=other]}", "`set` says model.init, which the suite sets itself"),
        ("{config: nowhere, train: b}", "`fine_tune`: .*nowhere"),
        ("{config: finetune_study, train: b, set: [optim.lrr=1]}", "unknown key `optim.lrr`. Did you mean `lr`"),
    ],
)
def test_mistakes_are_named(tmp_path, said, message):
    text = f"entries: [{{name: a, data: x, task: zeroshot, fine_tune: {said}}}]"
    with pytest.raises(UserError, match=message):
        load_suite(str(write_suite(tmp_path, text)))


def test_the_scaling_study_has_all_of_its_protocols():
    entries = load_suite("scaling_study").entries
    assert {entry.task for entry in entries} == {"zeroshot", "retrieval", "linear_probe"}
    assert [10, 25] in [entry.options.get("shots") for entry in entries]
    [tuned] = [entry.fine_tune for entry in entries if entry.fine_tune is not None]
    assert tuned.config in packaged_recipes()
    recipe = load_recipe(tuned.config, ["model.init=x", "data.train_shards=y"])
    assert recipe.model.lock == "text" and recipe.data.templates == "openai"
