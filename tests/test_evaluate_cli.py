"""`evaluate.py` on real folders: every task from its command line to its JSON."""

import json

import pytest

from dsclip.convert.hf import export_hf
from dsclip.errors import UserError
from dsclip.evaluate import TASKS
from dsclip.evaluate.cli import _parser, evaluate
from dsclip.evaluate.results.compare_cli import main as compare_command
from dsclip.evaluate.results.intervals import table
from dsclip.evaluate.tasks.templates import template_sets
from tests.shard_files import jpeg, write_tar
from tests.test_convert import checkpoint_of, perturbed, small


@pytest.fixture(scope="module")
def model(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "hf"
    export_hf(checkpoint_of(perturbed(small("demo")), demo), folder)
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A set for each task; returns {task: its options}."""
    root = tmp_path_factory.mktemp("sets")
    for split, count in (("train", 12), ("test", 6)):
        for i in range(count):
            folder = root / "pictures" / split / f"class {i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.jpg").write_bytes(jpeg(i + 100 * (split == "test")))
    (root / "images").mkdir()
    for i in range(2):
        (root / "images" / f"{i}.jpg").write_bytes(jpeg(i))
    samples = [
        {"filename": f"{i}.jpg", "caption": "a ring", "caption2": "one ring", "negative_caption": "a star"}
        for i in range(2)
    ]
    (root / "swap_obj.json").write_text(json.dumps(samples))
    pair = {
        "image_0": "0.jpg",
        "image_1": "1.jpg",
        "caption_0": "a ring above a star",
        "caption_1": "a star above a ring",
    }
    (root / "examples.jsonl").write_text(json.dumps(pair))
    cue = {"cue": "ring", "candidates": ["0", "1"], "associations": ["1"]}
    (root / "winogavil.jsonl").write_text(json.dumps(cue))
    shards = {f"{i}": {"jpg": jpeg(i), "cls": str(i % 2).encode(), "json": json.dumps({"caption": "x", "region": "north" if i < 4 else "south"}).encode()} for i in range(8)}  # fmt: skip
    write_tar(root / "regions.tar", shards)
    write_tar(
        root / "several.tar",
        {f"{i}": {"jpg": jpeg(i), "json": json.dumps({"labels": [i % 2]}).encode()} for i in range(4)},
    )
    (root / "names.txt").write_text("ring\nstar\n")
    regions = ["--data", str(root / "regions.tar")]
    return {
        "zeroshot": [
            *regions,
            "--classnames",
            str(root / "names.txt"),
            "--group-key",
            "region",
            "--templates",
            "simple",
        ],
        "retrieval": regions,
        "bag_retrieval": [*regions, "--group-key", "region"],
        "multilabel": ["--data", str(root / "several.tar"), "--classnames", str(root / "names.txt")],
        "hard_negatives": ["--data", str(root / "swap_obj.json"), "--images", str(root / "images")],
        "hard_positives": ["--data", str(root / "swap_obj.json")],
        "winoground": ["--data", str(root / "examples.jsonl")],
        "associations": ["--data", str(root / "winogavil.jsonl")],
        "linear_probe": ["--data", str(root / "pictures"), "--shots", "1", "2", "--seeds", "2"],
        "knn": ["--data", str(root / "pictures"), "--neighbours", "3"],
        "tip_adapter": ["--data", str(root / "pictures"), "--templates", "simple", "--shots", "1", "2"],
        "tfup": ["--data", str(root / "pictures"), "--templates", "simple", "--cache-weight", "0.5"],
    }


METRICS = {
    "zeroshot": {
        "top1",
        "top1_worst_group",
        "top1_north",
        "top1_south",
        "calibration_error",
        "mean_per_class_recall",
        "macro_f1",
    },
    "retrieval": {"image_to_text_recall@1", "text_to_image_recall@5"},
    "bag_retrieval": {"text_to_image_recall@1", "image_to_text_recall@1"},
    "multilabel": {"mean_average_precision"},
    "hard_negatives": {"accuracy"},
    "hard_positives": {"image_text", "text_only"},
    "winoground": {"text", "image", "group"},
    "associations": {"jaccard", "jaccard_5-6"},
    "linear_probe": {"top1_1shot", "top1_2shot"},
    "knn": {"top1", "mean_per_class_recall"},
    "tip_adapter": {"top1_1shot", "mean_per_class_recall_2shot", "top1_zeroshot"},
    "tfup": {"top1", "mean_per_class_recall", "top1_zeroshot"},
}


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_has_metrics_intervals_and_a_protocol(task, model, sets, tmp_path, capsys):
    options = ["--model", str(model), "--task", task, *sets[task], "--output", str(tmp_path / "a.json")]
    found = evaluate(_parser().parse_args(options))
    assert f"{task} · all embedded, measuring" in capsys.readouterr().err
    assert METRICS[task] <= found["metrics"].keys()
    for name in METRICS[task]:
        low, high = found["metrics"][f"{name}_ci95"]
        assert 0 <= low <= high <= 1 and 0 <= found["metrics"][name] <= 1
    written = json.loads((tmp_path / "a.json").read_text())
    assert written == json.loads(json.dumps(found))
    protocol = written["protocol"]
    assert protocol.keys() == {"model", "image", "text", "precision", "versions", "task", "data"} and protocol["task"]
    assert len(protocol["model"]["weights_sha256"]) == len(protocol["text"]["tokenizer_sha256"]) == 64
    assert compare_command([str(tmp_path / "a.json")] * 2) == 0
    assert "| +0.00 (" in capsys.readouterr().out


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("retrieval", ["--templates", "simple"], "--templates says nothing to the task retrieval"),
        ("zeroshot", ["--shots", "1"], "--shots says nothing to the task zeroshot"),
        ("linear_probe", ["--shots", "0"], "--shots must be 1 or more"),
        ("linear_probe", ["--seeds", "2"], "give --shots too"),
        ("linear_probe", ["--cache-weight", "2"], "--cache-weight says nothing to the task linear_probe"),
        ("tfup", ["--cache-sharpness", "nan"], "--cache-sharpness is nan; it must be a number, 0 or more"),
        ("tip_adapter", ["--cache-weight", "-1"], "--cache-weight is -1.0; it must be a number, 0 or more"),
    ],
)
def test_options_of_another_task_are_refused(task, options, message, model, sets):
    given = sets[task][:2]
    with pytest.raises(UserError, match=message):
        evaluate(_parser().parse_args(["--model", str(model), "--task", task, *given, *options]))


def test_a_probe_trains_on_the_split_train_and_never_on_test_images(model, sets, tmp_path):
    options = ["--model", str(model), "--task", "linear_probe", *sets["linear_probe"]]
    own = evaluate(_parser().parse_args(options))["metrics"]
    pictures = sets["linear_probe"][1]
    assert evaluate(_parser().parse_args([*options, "--train-data", pictures]))["metrics"] == own
    (tmp_path / "link").symlink_to(f"{pictures}/test")
    for extra, message in (
        (["--train-data", f"{pictures}/test"], "test: 6 of the 6 test images are among its images"),
        (["--train-data", str(tmp_path / "link")], "6 of the 6 test images"),
        (["--validation-data", f"{pictures}/test"], "--validation-data .*: 6 of the 6 test images"),
        (["--validation-data", pictures], "no split 'val'; choose one with split .test, train."),
        (["--split", "train"], "12 of the 12 test images"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(_parser().parse_args([*options, *extra]))


def test_tfup_which_reads_no_labels_may_see_test_images(model, sets):
    pictures = sets["tfup"][1]
    options = ["--model", str(model), "--task", "tfup", *sets["tfup"], "--train-data", f"{pictures}/test"]
    assert evaluate(_parser().parse_args(options))["metrics"]["samples"] == 6


def test_max_samples_cuts_the_test_set_alone(model, sets):
    options = ["--model", str(model), "--task", "knn", *sets["knn"][:2], "--neighbours", "12", "--max-samples", "4"]
    assert evaluate(_parser().parse_args(options))["metrics"]["samples"] == 4


@pytest.mark.parametrize(
    "options,said",
    [
        (["--group-key", "shelf"], "has the group key 'shelf'"),
        (["--negative-key", "wrong"], "has the key of hard negatives 'wrong'"),
        (["--host-memory-gb", "2"], "--host-memory-gb says something to --device-map auto alone"),
        (["--offload-folder", "x"], "--offload-folder says something to --device-map auto alone"),
    ],
)
def test_options_that_nothing_reads_are_refused(model, sets, options, said):
    arguments = ["--model", str(model), "--task", "retrieval", *sets["retrieval"], *options]
    with pytest.raises(UserError, match=said):
        evaluate(_parser().parse_args(arguments))


def test_a_strength_is_no_percentage_and_help_names_all_templates():
    assert table({"top1": 0.5, "regularisation": 2.4e-4}) == [("top1", "50.00%", ""), ("regularisation", "0.00024", "")]
    shown = " ".join(_parser().format_help().split())
    assert all(name in shown for name in template_sets())


def test_no_folder_for_weights_is_made_without_a_device_map(model, sets, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    evaluate(_parser().parse_args(["--model", str(model), "--task", "retrieval", *sets["retrieval"]]))


def test_a_result_beside_a_model_leaves_its_weights_alone(model, sets):
    before = (model / "model.safetensors").read_bytes()
    options = ["--model", str(model), "--task", "retrieval", *sets["retrieval"], "--output", str(model / "model.json")]
    evaluate(_parser().parse_args(options))
    assert (model / "model.safetensors").read_bytes() == before
    assert compare_command([str(model / "model.json")] * 2) == 0


def test_a_probe_without_training_samples_says_so(model, sets):
    with pytest.raises(UserError, match="no training samples in .* give --train-data"):
        evaluate(_parser().parse_args(["--model", str(model), "--task", "knn", *sets["retrieval"]]))
