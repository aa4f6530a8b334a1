"""What people see: progress, metrics on disk, pictures, the summary; and the learning-rate schedule."""

import io
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsclip.command_line import format_seconds
from dsclip.config.schema import OptimSection, Recipe, TrainSection
from dsclip.data.batch import Batch, LoadReport
from dsclip.distributed import Collectives
from dsclip.engine.host_copy import HostCopy
from dsclip.engine.step_metrics import StepMetrics
from dsclip.optim.schedule import learning_rate
from dsclip.train.metrics_log import MetricsLog
from dsclip.train.pictures import INK, RIGHT, retrieval_grid, similarity_matrix
from dsclip.train.progress import Progress, describe
from dsclip.train.summary import console_summary, write_summary
from dsclip.train.watch import Watch

METRICS = {
    "loss": 2.3145, "accuracy": 0.41, "logit_scale": 14.93, "lr": 5e-4, "grad_norm": 0.8, "samples_per_second": 310.4,
    "data_wait": 0.02, "skipped_steps": 0, "bad_samples": 0,
}  # fmt: skip
SUMMARY = {
    "steps": 400, "samples": 102400, "seconds": 187.0, "loss": 0.52,
    "eval": {
        "zeroshot": {"top1": 0.91, "top5": 1.0, "samples": 300, "classes": 48},
        "retrieval": {f"{way}_recall@{k}": k / 20 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
    },
    "eval_data": {"zeroshot": ["a.tar", "b.tar"], "retrieval": "demo"},
    "eval_names": {"zeroshot": "a.tar::b.tar", "retrieval": "demo (training pairs)"},
    "checkpoint": "runs/demo/checkpoints/step_00000400", "hf_export": "runs/demo/hf", "convertible": True, "samples_per_second": 547.6,
    "skipped_steps": 1, "bad_samples": {"no caption": 3}, "samples_read": 102403,
}  # fmt: skip


def test_lines_without_a_terminal_show_progress_and_metrics():
    stream = io.StringIO()
    progress = Progress(200, 100, True, stream)
    progress.update(101, METRICS)
    progress.update(102, METRICS)  # within a few seconds of the line before: not shown
    progress.message("saved")
    progress.update(200, METRICS)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and lines[1] == "saved"
    assert lines[0].startswith("step 101/200 · 50% · ETA ")
    assert "loss 2.314 · acc 41% · scale 14.9 · lr 5.0e-04 · grad 0.80 · 310 samples/s · wait 2%" in lines[0]


def test_problems_are_shown_only_when_there_are_any():
    assert "skipped" not in describe(METRICS)
    assert describe(METRICS | {"skipped_steps": 2, "bad_samples": 5}).endswith("2 steps skipped · 5 bad samples")


def test_other_ranks_are_silent():
    stream = io.StringIO()
    Progress(10, 0, False, stream).update(10, METRICS)
    assert stream.getvalue() == ""


def test_durations_are_readable():
    assert [format_seconds(s) for s in (5, 187, 18720, 273600)] == ["5s", "3m07s", "5h12m", "3d04h"]


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def events(run_dir):
    accumulator = EventAccumulator(str(run_dir / "tb"))
    accumulator.Reload()
    return accumulator


def test_metrics_reach_jsonl_and_tensorboard(tmp_path):
    log = MetricsLog(tmp_path, True)
    log.log(10, {"loss": 1.5, "samples_per_second": 99.0, "eval/zeroshot/top1": 0.25})
    log.log(20, {"loss": float("nan")})
    log.text("recipe", "lr: 1")
    log.image("eval/similarity", similarity_matrix(np.eye(4)), 20)
    log.close()
    assert lines(tmp_path)[0] == {"step": 10, "loss": 1.5, "samples_per_second": 99.0, "eval/zeroshot/top1": 0.25}
    assert lines(tmp_path)[1] == {"step": 20, "loss": None}
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train/loss")][0] == (10, 1.5)
    assert found.Scalars("speed/samples_per_second")[0].value == 99.0
    assert found.Scalars("eval/zeroshot/top1")[0].value == 0.25
    assert found.Tags()["images"] == ["eval/similarity"] and "recipe/text_summary" in found.Tags()["tensors"]


class Unarrived(HostCopy):
    """Numbers that a device still computes."""

    arrived = False

    def __getitem__(self, name):
        assert self.arrived, f"{name} was waited for"
        return super().__getitem__(name)


def test_a_logged_step_is_written_when_the_next_one_is_queued(tmp_path):
    engine = SimpleNamespace(group=Collectives.single(), step=0)
    inputs = SimpleNamespace(recipe=Recipe(train=TrainSection(steps=4, log_every=2)), run_dir=tmp_path, ds_config={})
    watch = Watch(inputs, engine, SimpleNamespace(counters=None, record=None))
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5), torch.arange(2), report=LoadReport(read=2))

    def step(number: int, loss: float) -> Unarrived:
        names = ("accuracy_image_to_text", "accuracy_text_to_image", "grad_norm", "log_scale", "masked_negatives")
        numbers = Unarrived({"loss": torch.tensor(loss)} | dict.fromkeys([*names, "hard_negatives"], torch.zeros(())))
        watch.step(StepMetrics(number, 1e-3, False, None, 0, numbers), batch, 0.0, 0.5)
        return numbers

    Unarrived.arrived = True
    step(1, 1.5)
    Unarrived.arrived = False
    step(2, 2.5)
    assert lines(tmp_path) == []
    Unarrived.arrived = True
    step(3, 3.5)
    assert [(line["step"], line["loss"], line["samples_read"]) for line in lines(tmp_path)] == [(2, 2.5, 4)]
    step(4, 4.5)
    watch.counted()  # for a checkpoint
    assert [(line["step"], line["loss"], line["samples_read"]) for line in lines(tmp_path)] == [
        (2, 2.5, 4),
        (4, 4.5, 8),
    ]
    watch.close()
    assert [line["samples_per_second"] for line in lines(tmp_path)] == [512.0, 512.0]


def test_a_histogram_without_a_finite_value_ends_no_run(tmp_path):
    log = MetricsLog(tmp_path, True)
    log.histogram("similarity/positive", torch.full((4,), torch.nan), 1)
    log.histogram("similarity/positive", torch.tensor([]), 2)
    log.histogram("similarity/positive", torch.tensor([torch.nan, 0.5, torch.inf]), 3)
    log.close()
    found = events(tmp_path).Histograms("similarity/positive")
    assert [(e.step, e.histogram_value.num) for e in found] == [(3, 1)]


def test_a_full_disk_costs_no_line_and_no_run(small_disk, capsys):
    log, filler = MetricsLog(small_disk, True), small_disk / "filler"
    log.log(1, {"loss": 1.0})
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    for step in range(2, 400):
        log.log(step, {"loss": float(step)})
        if step % 50 == 0:
            log.image("eval/similarity", similarity_matrix(np.eye(4)), step)
    assert (small_disk / "metrics.jsonl").read_text().count("\n") < 399
    filler.unlink()
    log.log(400, {"loss": 400.0})
    assert [(e["step"], e["loss"]) for e in lines(small_disk)] == [(step, float(step)) for step in range(1, 401)]
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    for step in range(401, 500):
        log.log(step, {"loss": float(step)})
    log.close()
    said = capsys.readouterr().err
    assert said.count("its lines wait in memory, and the run goes on") == 2 and "nothing of it is missing" in said
    assert said.count("TensorBoard's file can't be written (No space left on device)") == 1 and "Traceback" not in said
    lost = 499 - int((small_disk / "metrics.jsonl").read_text().count("\n"))
    assert f"its last {lost} lines are lost" in said and lost > 0


def test_a_resumed_log_does_not_overlap(tmp_path):
    log = MetricsLog(tmp_path, True)
    for step in (10, 20, 30):
        log.log(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 40, "lo')  # a crash in the middle of a line
    log = MetricsLog(tmp_path, True, start_step=20)
    log.log(30, {"loss": 0.5})
    log.close()
    assert [(e["step"], e["loss"]) for e in lines(tmp_path)] == [(10, 10.0), (20, 20.0), (30, 0.5)]
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("train/loss")] == [(10, 10.0), (20, 20.0), (30, 0.5)]


def pixels_of(picture, colour) -> int:
    return int((picture == np.array(colour)).all(axis=2).sum())


def test_the_retrieval_grid_marks_the_right_image():
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)
    captions = ["a caption " * 30, "", "Zürich 日本", "x", "y", "z"]
    right = retrieval_grid(images, captions, np.eye(6), rows=6)
    wrong = retrieval_grid(images, captions, -np.eye(6), rows=6)  # the own image comes last, beyond the shown five
    assert right.dtype == np.uint8 and right.ndim == 3
    assert pixels_of(right, RIGHT) > 1000 and pixels_of(wrong, RIGHT) == 0
    assert retrieval_grid(images[:1], captions[:1], np.eye(1)).shape[2] == 3


def test_the_similarity_matrix_has_a_dark_diagonal_and_shows_negative_values():
    heat = similarity_matrix(np.eye(8) - np.eye(8, k=1) * 0.5).astype(int)[92 : 92 + 512, 74 : 74 + 512]
    own, below_zero, zero = heat[32, 32], heat[32, 96], heat[96, 32]
    assert own.sum() < 300 < zero.sum() and own[2] > own[0]
    assert below_zero[0] > below_zero[2] + 50 and below_zero.sum() < zero.sum() - 100
    assert similarity_matrix(np.zeros((1, 1))).shape == similarity_matrix(np.eye(8)).shape


def test_pictures_name_their_data_with_labelled_axes():
    plain, named = (similarity_matrix(np.eye(16), data) for data in ("", "a/long/folder/" * 9 + "x (training pairs)"))
    assert (plain[:34] != named[:34]).any() and (plain[40:] == named[40:]).all()
    assert pixels_of(plain[:, :74], INK) > 20 and pixels_of(plain[60:90], INK) > 20


def test_the_summary_states_results_and_what_to_do_next(tmp_path):
    write_summary(tmp_path, SUMMARY)
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY
    text, console = (tmp_path / "summary.md").read_text(), console_summary(SUMMARY, tmp_path)
    assert text.count("on demo (training pairs) |") == 6, "each number says what it was measured on"
    for shown in ("91.0%", "3m07s", "3 no caption", "tools/convert_hf.py runs/demo/checkpoints/step_00000400"):
        assert shown in text
    assert "zero-shot top-1 91.0% over 48 classes, 300 images of a.tar::b.tar" in console
    assert "text to image recall@1/5/10 5.0% / 25.0% / 50.0% on demo (training pairs)" in console
    assert "tensorboard --logdir" in console
    assert "convert_hf" not in console_summary(SUMMARY | {"convertible": False}, tmp_path)
    assert "launchers/evaluate.py --model runs/demo/hf --task zeroshot --data a.tar::b.tar" in console


def test_the_schedule_warms_up_and_falls():
    optim = OptimSection(lr=1.0, warmup_steps=10, min_lr=0.1)
    rates = [learning_rate(s, 110, optim) for s in range(111)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(50, 110, replace(optim, schedule="constant")) == 1.0
    assert learning_rate(35, 110, replace(optim, min_lr=0.0)) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_the_inverse_root_falls_as_one_over_the_root_of_the_step_to_its_floor():
    optim = OptimSection(lr=1.0, warmup_steps=4, schedule="inverse_sqrt")
    steps = (0, 1, 3, 4, 15, 35, 399)
    by_hand = [0.25, 0.5, 1.0, math.sqrt(0.8), 0.5, 1 / 3, 0.1]
    assert [learning_rate(s, 400, optim) for s in steps] == pytest.approx(by_hand, rel=1e-15)
    assert learning_rate(399, 400, replace(optim, min_lr=0.2)) == 0.2
    assert [learning_rate(s, 9, replace(optim, warmup_steps=0)) for s in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3])


def test_warm_up_stable_decay():
    optim = OptimSection(lr=1.0, warmup_steps=2, schedule="wsd", decay_share=0.4, min_lr=0.2)
    by_hand = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    assert [learning_rate(s, 10, optim) for s in range(12)] == pytest.approx(by_hand, rel=1e-15)
    assert [learning_rate(s, 10, replace(optim, decay_share=None)) for s in (8, 9)] == pytest.approx([1.0, 0.6])
