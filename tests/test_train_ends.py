"""How a run ends when something goes wrong on the way: evaluations, launchers' variables, the summary."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsclip.config import load_recipe
from dsclip.distributed import Collectives, launched_ranks
from dsclip.errors import UserError
from dsclip.train.guarded_evaluation import evaluate
from dsclip.train.resume import changed_keys, describe_changes
from dsclip.train.summary import console_summary, markdown
from tests.test_train_watching import SUMMARY


class Engine:
    step = 7

    def __init__(self, group):
        self.group = group


class Broken:
    def run(self, engine, watch):
        raise ValueError("no picture")


class Said(list):
    def event(self, step, text, *, evaluation_error):
        assert text == f"step {step}: the evaluation failed, and the run goes on: {evaluation_error}"
        self.append((step, evaluation_error))


def test_an_evaluation_error_of_a_single_rank_run_is_reported(capsys):
    said = Said()
    assert evaluate(Broken(), Engine(Collectives.single()), said) == ({}, "ValueError: no picture")
    assert said == [(7, "ValueError: no picture")] and "Traceback" in capsys.readouterr().err


def test_ranks_out_of_step_end_the_run_with_the_error():
    class Alone:
        rank = 0

        def meet(self, word, timeout_s):
            assert word == "ValueError: no picture"
            return None  # the other rank hangs in a collective

    with pytest.raises(ValueError, match="no picture"):
        evaluate(Broken(), Engine(Alone()), Said())


@pytest.mark.parametrize("name, text", [("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("RANK", "-1"), ("LOCAL_RANK", "")])
def test_a_launchers_variable_that_is_no_number_is_a_sentence(name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match=f"environment variable {name} is '{text}' and must be a number"):
        launched_ranks()


def test_the_launcher_prints_that_sentence_and_exits_with_2():
    root = Path(__file__).parent.parent
    env = os.environ | {"WORLD_SIZE": "two", "PYTHONPATH": str(root)}
    command = [sys.executable, "launchers/train.py", "--ds_config", "ds_configs/zero3_bf16.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "WORLD_SIZE is 'two'" in done.stderr


def test_a_key_under_its_old_name_in_a_manifest_is_compared_with_the_new_one():
    recipe = load_recipe("demo", ["batch.micro_batch_size=8"])
    assert changed_keys({"batch": {"samples_per_forward": 8}}, recipe) == {}
    assert changed_keys({"batch": {"samples_per_forward": 4}}, recipe) == {"batch.micro_batch_size": [4, 8]}


def test_the_summary_of_a_run_in_parts_is_true():
    run = SUMMARY | {
        "hf_export": None, "convertible": True, "launch": {"from_step": 334, "steps": 66, "seconds": 14.0},
        "resumes": [{"step": 334, "changes": {"optim.lr": [1e-3, 5e-4]}}],
        "evaluation_errors": [{"step": 200, "error": "the shard is gone"}],
    }  # fmt: skip
    console, text = console_summary(run, Path("runs/demo")), markdown(run, Path("runs/demo"))
    assert "Done: 400 steps, 66 of them in this launch, which took 14s." in console
    assert "HuggingFace not written" in console and "None" not in console
    assert "1 steps, because something in them was not finite" in console and "3 no caption" in console
    for shown in ("at step 334 with optim.lr 0.001 → 0.0005", "step 200: the shard is gone"):
        assert shown in console and shown in text


def test_the_summary_of_a_run_that_went_back_is_true():
    run = SUMMARY | {
        "launch": {"from_step": 0, "steps": 455, "seconds": 200.0}, "left_out_batches": [[11, 20], [18, 25]],
        "spikes": [{"steps": [s, s + 1], "loss": 4.0, "usual": 2.0} for s in range(19, 26)],
        "rollbacks": [{"step": 10, "batches": [11, 20], "why": "the loss jumped"}],
    }  # fmt: skip
    console, text = console_summary(run, Path("runs/demo")), markdown(run, Path("runs/demo"))
    assert "Done: 400 steps. This launch went back, made 455 steps, and took 3m20s." in console
    shown = ("to step 10: the loss jumped", "25 to 26 and 2 times before", "15 batches: 11 to 20, 18 to 25")
    assert all(words in console and words in text for words in shown) and "resumed" not in console


def test_only_keys_that_differ_are_shown_and_the_learning_rate_follows():
    was = load_recipe("demo", ["train.steps=100", "data.crop_scale=[0.5, 1.0]", "train.name=a"])
    old = {
        "optim": vars(was.optim), "data": vars(was.data), "model": vars(was.model),
        "train": vars(was.train), "gone": {"key": 1},
    }  # fmt: skip
    now = load_recipe("demo", ["train.steps=200", "data.crop_scale=[0.9, 1.0]", "data.decoder=exact", "train.name=b"])
    assert changed_keys(old, now) == {
        "data.decoder": ["fast", "exact"], "data.crop_scale": [[0.5, 1.0], [0.9, 1.0]], "train.steps": [100, 200],
    }  # fmt: skip
    lines = describe_changes(old, now, step=60)
    assert lines[-1].startswith("the learning rate of step 61 is therefore 0.00")
    assert "falls with the new number of steps" in lines[-1]
    assert describe_changes(old, was, step=60) == []
