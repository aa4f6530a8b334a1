"""Suites: what a file may say, many tasks on images that are embedded once, kept results, what is missing."""

import json

import pytest

from dsclip.data import ShardWriter
from dsclip.errors import UserError
from dsclip.evaluate import cli
from dsclip.evaluate.progress import EvaluationProgress
from dsclip.evaluate.suites.report import averages
from dsclip.evaluate.suites.suite import load_suite, suite_names
from dsclip.evaluate.tasks.registry import TASKS
from tests.shard_files import jpeg

ENTRIES = """
title: A suite of mine
average: my average
entries:
  - {name: zero, task: zeroshot, data: labelled, templates: mine.txt, groups: [first]}
  - {name: simple, task: zeroshot, data: [elsewhere, labelled], templates: simple, main: mean_per_class_recall, groups: [first]}
  - {name: both ways, task: retrieval, data: labelled, main: [image_to_text_recall@1, text_to_image_recall@1]}
  - {name: gone, task: zeroshot, data: [nowhere, also/nowhere]}
  - {name: other, data: labelled, unsupported: no such metric here}
"""


@pytest.fixture
def model(demo, tmp_path):
    from dsclip.convert import export_hf
    from tests.test_convert import checkpoint_of, perturbed, small

    export_hf(checkpoint_of(perturbed(small("demo")), demo), tmp_path / "hf")
    return tmp_path / "hf"


def write_set(folder, samples=12, classes=3):
    with ShardWriter(folder, 5, classes=[f"thing {i}" for i in range(classes)], templates=["a {}"]) as writer:
        for i in range(samples):
            text = json.dumps({"caption": [f"picture {i}", f"number {i}"]}).encode()
            writer.write(f"{i:04d}", {"jpg": jpeg(i), "json": text, "cls": str(i % classes).encode()})


def write_suite(folder, text=ENTRIES):
    (folder / "mine.txt").write_text("this is {}\n")
    (folder / "suite.yaml").write_text(text)
    return folder / "suite.yaml"


def run(tmp_path, model, capsys, *arguments, code=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
        try:
            cli.main([
                "--model", str(model), "--suite", str(tmp_path / "suite.yaml"), "--data-root", str(tmp_path / "data"),
                "--output", str(tmp_path / "out"), "--batch-size", "4", *arguments,
            ])  # fmt: skip
            ended = 0
        except SystemExit as end:
            ended = end.code
    shown = capsys.readouterr()
    assert ended == code, shown.err
    return shown


def test_many_tasks_in_one_go_are_kept_and_shown_in_one_table(tmp_path, model, capsys):
    write_set(tmp_path / "data" / "labelled")
    write_suite(tmp_path)
    shown = run(tmp_path, model, capsys, "--json")
    result = json.loads(shown.out)
    assert [e["state"] for e in result["entries"]] == ["done", "done", "done", "missing", "unsupported"]
    zero, simple, both = result["entries"][:3]
    for entry, arguments in ((zero, ["zeroshot", "--templates", str(tmp_path / "mine.txt")]), (both, ["retrieval"])):
        alone = cli.evaluate(cli._parser().parse_args([
            "--model", str(model), "--data", str(tmp_path / "data" / "labelled"), "--batch-size", "4", "--task", *arguments
        ]))  # fmt: skip
        assert entry["metrics"] == alone["metrics"], "as without a suite"
    assert zero["value"] == zero["metrics"]["top1"] and zero["ci95"] == zero["metrics"]["top1_ci95"]
    assert simple["value"] == simple["metrics"]["mean_per_class_recall"]
    recalls = [both["metrics"][f"{way}_recall@1"] for way in ("image_to_text", "text_to_image")]
    assert both["value"] == sum(recalls) / 2 and both["ci95"] is None
    values = [zero["value"], simple["value"], both["value"]]
    assert result["averages"] == [
        {"name": "my average", "value": sum(values) / 3, "of": 3, "entries": 5},
        {"name": "first", "value": sum(values[:2]) / 2, "of": 2, "entries": 2},
    ]
    assert "12 images left" in shown.err and "ETA" in shown.err, "counted once for three tasks"

    again = run(tmp_path, model, capsys)
    assert "images left" not in again.err and "my average (3 of 5)" in again.out
    assert (
        "not there: gone (none of nowhere, also/nowhere)" in again.out and "not measured: other (no such" in again.out
    )
    table = run(tmp_path, model, capsys, "--markdown").out
    assert "| set | task | metric | value | 95% interval | samples |" in table and f"| {zero['value']:.2%} |" in table
    assert (tmp_path / "out" / "results.md").read_text() == table
    kept = json.loads((tmp_path / "out" / "results.json").read_text())["entries"]
    assert [e["state"] for e in kept[:3]] == ["kept"] * 3 and kept[0]["metrics"] == zero["metrics"]


def test_only_what_changed_is_measured_again(tmp_path, model, capsys):
    write_set(tmp_path / "data" / "labelled")
    write_suite(tmp_path)
    run(tmp_path, model, capsys)
    (tmp_path / "mine.txt").write_text("that was {}\n")
    states = [e["state"] for e in json.loads(run(tmp_path, model, capsys, "--json").out)["entries"]]
    assert states[:3] == ["done", "kept", "kept"], "another template"
    (tmp_path / "data" / "labelled").rename(tmp_path / "data" / "old")
    write_set(tmp_path / "data" / "labelled", samples=13)
    states = [e["state"] for e in json.loads(run(tmp_path, model, capsys, "--json").out)["entries"]]
    assert states[:3] == ["done"] * 3, "other images"


def test_an_entry_that_fails_ends_no_other_and_the_exit_code_says_so(tmp_path, model, capsys):
    write_set(tmp_path / "data" / "labelled")
    text = "entries:\n- {name: a, task: hard_negatives, data: labelled}\n- {name: b, task: retrieval, data: labelled}\n"
    write_suite(tmp_path, text)
    result = json.loads(run(tmp_path, model, capsys, "--json", code=1).out)
    assert [e["state"] for e in result["entries"]] == ["failed", "done"]
    assert "needs hard negatives" in result["entries"][0]["reason"]


def test_a_suite_without_any_set_is_one_line(tmp_path, capsys):
    write_suite(tmp_path)
    (tmp_path / "data").mkdir()
    shown = run(tmp_path, tmp_path / "no_model", capsys, code=2)
    assert "none of the 5 sets of the suite suite is in" in shown.err and len(shown.err.splitlines()) == 1


def test_probes_find_their_training_set_below_the_root(tmp_path, model, capsys):
    write_set(tmp_path / "data" / "labelled")
    write_set(tmp_path / "data" / "more", samples=24)
    write_suite(tmp_path, "entries: [{name: k, task: knn, data: labelled, train: more, neighbours: 3}]\n")
    entry = json.loads(run(tmp_path, model, capsys, "--json").out)["entries"][0]
    alone = cli.evaluate(cli._parser().parse_args([
        "--model", str(model), "--data", str(tmp_path / "data" / "labelled"), "--batch-size", "4", "--task", "knn",
        "--train-data", str(tmp_path / "data" / "more"), "--neighbours", "3",
    ]))  # fmt: skip
    assert entry["state"] == "done" and entry["metrics"] == alone["metrics"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entries: []", "a suite has `entries`"),
        ("- a", "a suite has `entries`"),
        ("entries: [{data: x, task: zeroshoot}]", "entry 1: task 'zeroshoot' is none of .*Did you mean `zeroshot`"),
        ("entries: [{data: x, task: zeroshot, template: y}]", "no key `template`. Did you mean `templates`"),
        ("entries: [{data: x, task: retrieval, templates: y}]", "retrieval doesn't read `templates`"),
        ("entries: [{task: retrieval}]", "has no `data`"),
        ("entries: [{data: 3, task: retrieval}]", "`data` is 3; it must be a text"),
        ("entries: [{data: x, task: retrieval}, {data: x, task: zeroshot}]", "several entries with the name 'x'"),
        ("entries: [", "is no YAML"),
        (
            "entries: [{data: x, task: knn, neighbours: many}]",
            "entry 1: `neighbours` is 'many'; it must be a whole number",
        ),
        ("entries: [{data: x, task: linear_probe, shots: [a]}]", "`shots` is .'a'.; it must be a whole number"),
        ("entries: [{data: x, task: retrieval, max_samples: ten}]", "`max_samples` is 'ten'; it must be a whole"),
        ("entries: [{data: x, task: retrieval, max_samples: -3}]", "`max_samples` is -3; it must be a whole"),
        ("entries: [{data: x, task: zeroshot, templates: 5}]", "`templates` is 5; it must be a text, or a list"),
        ("entries: [{data: x, task: zeroshot, split: 3}]", "`split` is 3; it must be a text"),
        ("entries: [{data: x, task: knn, train: 3}]", "`train` is 3; it must be a text"),
        ("entries: [{data: x, unsupported: true}]", "`unsupported` is True; it must be a text"),
    ],
)
def test_mistakes_in_a_suite_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_suite(str(write_suite(tmp_path, text)))


def test_numbers_are_class_names_and_one_number_of_shots_is_a_list(tmp_path):
    text = "entries: [{name: a, data: x, task: linear_probe, shots: 4}, {name: b, data: x, task: zeroshot, classnames: [1, b]}]"
    shots, names = load_suite(str(write_suite(tmp_path, text))).entries
    assert shots.options["shots"] == [4] and names.options["classnames"] == ["1", "b"]


def test_a_damaged_result_is_measured_again_and_a_main_that_is_no_share_fails(tmp_path, model, capsys):
    write_set(tmp_path / "data" / "labelled")
    text = """entries:
- {name: a, task: retrieval, data: "labelled/*.tar"}
- {name: b, task: zeroshot, data: labelled, main: samples}
- {name: c, task: zeroshot, data: labelled, main: top9, templates: simple}
"""
    write_suite(tmp_path, text)
    found = json.loads(run(tmp_path, model, capsys, "--json", code=1).out)["entries"]
    assert [e["state"] for e in found] == ["done", "failed", "failed"]
    assert "`main` is samples, and the metrics of the task are top1" in found[1]["reason"]
    kept = next((tmp_path / "out" / "entries").glob("a-*.json"))
    whole = kept.read_text()
    for damaged in (whole[:50], "{}", None):
        kept.write_text(damaged) if damaged else kept.with_suffix(".values.safetensors").unlink()
        again = json.loads(run(tmp_path, model, capsys, "--json", code=1).out)["entries"][0]
        assert again["state"] == "done" and again["metrics"] == found[0]["metrics"]


def test_the_suites_that_come_with_dsclip_can_be_read():
    assert suite_names() == ["compositional", "datacomp38", "scaling_study", "vtab+"]
    for name in suite_names():
        assert all(entry.task in TASKS or entry.unsupported for entry in load_suite(name).entries)
    datacomp = load_suite("datacomp38").entries
    assert len(datacomp) == 38 and len([e for e in datacomp if "VTAB" in e.groups]) == 13
    assert {e.name for e in datacomp if e.main == ("mean_per_class_recall",)} == {
        "caltech101",
        "fgvc_aircraft",
        "flowers",
        "pets",
    }
    assert len(load_suite("vtab+").entries) == 36
    with pytest.raises(UserError, match="there is no suite datacomp: give one of compositional, datacomp38"):
        load_suite("datacomp")


def test_options_of_one_task_and_of_suites_do_not_mix():
    for arguments, message in (
        (["--suite", "vtab+", "--task", "zeroshot"], "--task can't be given with --suite"),
        (["--suite", "vtab+", "--caption-key", "x"], "--caption-key can't be given with --suite"),
        (
            ["--task", "zeroshot", "--data", "demo:val", "--max-samples", "-3"],
            "--max-samples is -3; it must be 1 or more",
        ),
        (["--task", "zeroshot"], "--task and --data, or --suite"),
        (["--task", "zeroshot", "--data", "demo:val", "--data-root", "x"], "--data-root says where the sets"),
    ):
        with pytest.raises(UserError, match=message):
            cli.evaluate(cli._parser().parse_args(["--model", "none", *arguments]))


def test_averages_of_nothing_are_none():
    rows = [{"name": "a", "groups": ["g"], "state": "missing"}]
    assert averages({"average": "all", "entries": rows})[1] == {"name": "g", "value": None, "of": 0, "entries": 1}


def test_time_left_is_that_of_images_and_texts_at_their_own_pace(capsys):
    clock = [0.0]
    progress = EvaluationProgress({"images": 100, "texts": 10}, True, now=lambda: clock[0])
    progress.begin("1/2 a")
    clock[0] = 4.0
    progress.embedded("images", 40)
    assert progress.seconds_left() is None, "no text has been seen"
    clock[0] = 14.0
    progress.embedded("texts", 5)
    assert progress.seconds_left() == 60 * 0.1 + 5 * 2.0
    progress.begin("2/2 b")
    assert "2/2 b · 60 images left · 5 texts left · ETA 16s" in capsys.readouterr().err
    clock[0] = 24.0
    progress.fitted(4, 20)
    assert "2/2 b · 4 of at most 20 classifiers fitted · ETA 40s" in capsys.readouterr().err
