"""Evaluation settings are checked before a run begins, and its results say what they were measured on."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsclip.config import load_recipe
from dsclip.convert.model_card import model_card, results_of_run
from dsclip.create import create_model
from dsclip.data.shards.overlap import data_name, training_pairs
from dsclip.errors import UserError
from dsclip.losses import SingleRank
from dsclip.train.cli import parse_arguments
from dsclip.train.data_warnings import data_warnings
from dsclip.train.hangs import Heart
from dsclip.train.inputs import read_inputs
from dsclip.train.metrics_log import MetricsLog
from dsclip.train.watch import Watch
from tests.shard_files import jpeg, sample, write_set, write_tar

OFF = ["eval.zeroshot_shards=null", "eval.retrieval_shards=null", "eval.hard_negatives_shards=null"]


def plan(tmp_path, *overrides):
    arguments = parse_arguments(
        [
            "--ds_config",
            "zero3_bf16",
            "--config",
            "demo",
            f"train.output={tmp_path}",
            "batch.global_batch_size=8",
            *overrides,
        ]
    )
    return read_inputs(arguments)


def label(index: int) -> dict[str, bytes]:
    return {"jpg": jpeg(index), "cls": str(index % 3).encode()}


@pytest.mark.parametrize(
    "case, overrides, message",
    [
        ("pairs", ["eval.zeroshot_shards={set}"], r"eval.zeroshot_shards={set}: zero-shot .* needs class names"),
        ("pairs", ["eval.zeroshot_shards={set}", "eval.classnames=[a,b]"], "needs labels: none of these samples has"),
        ("labels", ["eval.zeroshot_shards={set}", "eval.classnames=[a,b]"], "has class 2, but there are 2 class names"),
        ("labels", ["eval.zeroshot_shards={set}", "eval.classnames=[a,b,c]", "eval.templates=[a photo]"], "has no {{}} where"),
        ("labels", ["eval.retrieval_shards={set}"], "eval.retrieval_shards={set}: retrieval needs captions"),
        ("pairs", ["eval.hard_negatives_shards={set}"], "eval.hard_negatives_shards={set}: .* needs hard negatives"),
        ("text", ["eval.retrieval_shards={set}"], r"eval.retrieval_shards={set}: no usable sample .*6 no image"),
    ],
)  # fmt: skip
def test_an_evaluation_that_would_fail_stops_the_run_before_its_first_step(case, overrides, message, demo, tmp_path):
    make = {"pairs": sample, "labels": label, "text": lambda i: {"txt": b"a"}}[case]
    write_tar(tmp_path / "0.tar", {f"{i}": make(i) for i in range(6)})
    found = str(tmp_path / "0.tar")
    with pytest.raises(UserError, match=message.format(set=found)):
        plan(tmp_path, *OFF, *(o.format(set=found) for o in overrides))
    assert [p.name for p in tmp_path.iterdir()] == ["0.tar"]


def test_training_pairs_are_recognised_by_their_shards(tmp_path):
    train, val = write_set(tmp_path / "train", 2, 3), write_set(tmp_path / "val", 1, 3)
    (tmp_path / "link").symlink_to(train)
    assert training_pairs(str(val), str(train)) is None
    assert training_pairs(str(train / "001.tar"), str(train)) == "training pairs"
    assert training_pairs(str(tmp_path / "link"), [str(val), str(train)]) == "training pairs"
    assert training_pairs(f"{train}::{val}", str(train)) == "partly training pairs"
    assert data_name(["a", "b"], "training pairs") == "a::b (training pairs)" and data_name("a", None) == "a"


class Recorder:
    """What an evaluation shows."""

    def __init__(self):
        self.messages, self.pictures = [], {}
        self.heart = Heart(minutes=2 / 60)  # two polls

    def message(self, text):
        self.messages.append(text)

    def picture(self, tag, image, step):
        self.pictures[tag] = image

    def evaluated(self, step, results, names):
        self.results, self.names = results, names


def test_labelled_images_without_captions_and_broken_ones_take_no_part_in_retrieval_or_its_pictures(demo, tmp_path):
    samples = {f"{i:02d}": (label(i) if i % 2 else sample(i)) for i in range(12)}
    samples["04"] = {"jpg": b"\xff\xd8\xff no picture", "txt": b"broken"}
    write_tar(tmp_path / "0.tar", samples)
    planned = plan(tmp_path, *OFF, f"eval.retrieval_shards={tmp_path}/0.tar", f"data.train_shards={tmp_path}/0.tar")
    model = create_model("demo", vocab_size=planned.model.vocab_size, eot_token_id=planned.model.eot_token_id).eval()
    engine = SimpleNamespace(
        encode_image=lambda x: model(x, None)[0], encode_text=lambda x: model(None, x)[1], group=SingleRank(), step=7
    )
    seen = Recorder()
    assert not seen.heart.polled()
    with torch.no_grad():
        results = planned.evaluation.run(engine, seen)
    assert results["retrieval"]["images"] == results["retrieval"]["captions"] == 5
    assert planned.evaluation.sets["retrieval"].bad == {"undecodable image": 1}
    assert results["retrieval"]["left_out"] == 1 and any("1 undecodable image" in line for line in seen.messages)
    assert not seen.heart.polled()  # each embedded batch was progress
    assert set(seen.pictures) == {"eval/retrieval", "eval/similarity"}
    assert seen.names == {"retrieval": f"{tmp_path}/0.tar (training pairs)"}


def test_every_number_says_what_it_was_measured_on(tmp_path):
    """Log, TensorBoard's tags, console, and the card of a model that is converted later."""
    watch = object.__new__(Watch)
    watch._unwritten = None
    watch._log, shown = MetricsLog(tmp_path, True), []
    watch._progress = SimpleNamespace(message=shown.append)
    names = {
        "zeroshot": "val",
        "retrieval": "train (training pairs)",
        "hard_negatives": "train::val (partly training pairs)",
    }
    results = {
        "zeroshot": {"top1": 0.5},
        "retrieval": {"image_to_text_recall@1": 0.25, "images": 4},
        "hard_negatives": {"accuracy": 0.75},
    }
    watch.evaluated(10, results, names)
    watch.evaluated(20, {task: {k: v / 5 for k, v in values.items()} for task, values in results.items()}, names)
    watch._log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line == {
        "step": 10, "eval_names": names, "eval/zeroshot/top1": 0.5,
        "eval_on_training_pairs/retrieval/image_to_text_recall@1": 0.25, "eval_on_training_pairs/retrieval/images": 4,
        "eval_on_partly_training_pairs/hard_negatives/accuracy": 0.75,
    }  # fmt: skip
    assert "step 10: retrieval on train (training pairs): image_to_text_recall@1 25.0%" in shown
    config = create_model("demo").config
    checkpoint = SimpleNamespace(
        path=tmp_path / "checkpoints" / "step_00000010",
        step=10,
        samples=80,
        average=False,
        config=config,
        recipe={},
        logit_scale=1.0,
        logit_bias=None,
    )
    found = results_of_run(checkpoint)
    assert found == (results, names)
    card = model_card(checkpoint, *found)
    assert "| retrieval | train (training pairs) | image_to_text_recall@1 | 0.2500 |" in card
    assert "| zeroshot | val | top1 | 0.5000 |" in card
    shutil.rmtree(tmp_path / "tb")
    (tmp_path / "metrics.jsonl").unlink()
    assert results_of_run(checkpoint) == ({}, {}) and "Not measured" in model_card(checkpoint, {}, {})


def test_intervals_are_logged_beside_their_metrics(tmp_path):
    """A list in the log, two points in TensorBoard, a column of the card."""
    watch = object.__new__(Watch)
    watch._unwritten = None
    watch._log, shown = MetricsLog(tmp_path, True), []
    watch._progress = SimpleNamespace(message=shown.append)
    results, names = {"zeroshot": {"top1": 0.5, "top1_ci95": [0.4, 0.625], "samples": 8}}, {"zeroshot": "val"}
    watch.evaluated(10, results, names)
    watch._log.close()
    assert shown == ["step 10: zeroshot on val: top1 50.0% (40.0% – 62.5%)"]
    found = EventAccumulator(str(tmp_path / "tb")).Reload()
    points = {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"]}
    tag = "eval/zeroshot/top1"
    assert points == {
        tag: 0.5, f"{tag}_ci95/lower": pytest.approx(0.4), f"{tag}_ci95/upper": 0.625, "eval/zeroshot/samples": 8
    }  # fmt: skip
    config = create_model("demo").config
    checkpoint = SimpleNamespace(
        path=tmp_path / "checkpoints" / "x", step=10, samples=80, config=config, recipe={}, logit_scale=1.0, logit_bias=None,
        average=False,
    )  # fmt: skip
    assert results_of_run(checkpoint) == (results, names)
    card = model_card(checkpoint, results, names)
    assert "| zeroshot | val | top1 | 0.5000 | 0.4000 – 0.6250 |\n| zeroshot | val | samples | 8 |  |" in card


@pytest.mark.parametrize(
    "sizes, overrides, expected",
    [
        ([256], [], None),
        ([100], [], "a global batch of 256 takes 256 samples of a set of 100, so images meet themselves"),
        ([100], ["loss.duplicates=mask"], "told by equal captions"),
        ([100], ["loss.duplicates=mask", "data.group_key=image_id"], None),
        ([1000, 20], ["data.weights=[9,1]", "data.train_shards=[a,b]"], "takes 26 samples of a set of 20"),
        ([1000, 30], ["data.weights=[9,1]", "data.train_shards=[a,b]"], None),
    ],
)
def test_a_batch_that_holds_an_image_twice_is_warned_of(sizes, overrides, expected):
    found = data_warnings(load_recipe("demo", overrides), sizes)
    assert [expected in line for line in found] == ([] if expected is None else [True])


@pytest.mark.parametrize("key", ["data.train_shards", "eval.zeroshot_shards", "eval.retrieval_shards"])
def test_shards_that_are_missing_are_named_with_the_key_that_names_them(key, demo, tmp_path):
    with pytest.raises(UserError, match=f"`{key}`: shard nowhere does not exist"):
        plan(tmp_path, f"{key}=nowhere")
