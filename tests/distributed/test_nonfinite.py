"""A step with a number that is not finite leaves no trace, in every packaged DeepSpeed configuration, on every rank."""

import json

import pytest

from dsclip.checkpoint import read_checkpoint
from tests.distributed.launch import SMALL, WORKERS, run_ranks, steps, train

REASONS = {
    "features": "features on 1 of 2 ranks",
    "feature gradient": "gradients",
    "overflowing gradient": "gradients",
    "loss": "loss on 2 of 2 ranks",
    "infinite loss on one rank": "loss on 1 of 2 ranks",
    "d_log_scale": "d_log_scale on 2 of 2 ranks",
    "d_log_scale on one rank": "d_log_scale on 1 of 2 ranks",
    "d_log_scale whose square overflows": "d_log_scale on 2 of 2 ranks",
    "d_bias": "d_bias on 2 of 2 ranks",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("nonfinite") / "results.json"
    run_ranks(WORKERS / "nonfinite_worker.py", 2, out, timeout_s=600)
    return [case for rank in json.loads(out.read_text()) for case in rank]


def test_every_packaged_configuration_is_covered(results):
    expected = {"zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_offload_bf16", "zero3_persist_bf16"}
    assert {r["config"] for r in results} >= expected


def test_nothing_changes_and_the_reason_is_told(results):
    for case in results:
        for what, found in case["injections"].items():
            expected = {"skipped": True, "reason": REASONS[what], "changed": []}
            assert found == expected, (case["config"], case["coalesce"], what)


def test_the_next_steps_are_what_they_would_have_been(results):
    for case in results:
        assert case["losses"] and not case["different"], case
        assert case["moved"] == ["average", "bf16 weights", "fp32 weights", "moments", "queue", "scalars"], case


def test_weights_that_are_not_finite_are_never_saved(results):
    for case in results:
        assert "step 13: the weights are no longer finite" in case["save"], case


BROKEN_TEMPERATURE = """
from dataclasses import replace
import torch
from dsclip.losses import register, softmax

@register("broken")
def broken(pairs, **options):
    grads = softmax(pairs, **options)
    return replace(grads, d_log_scale=grads.d_log_scale * torch.nan)
"""


def test_a_run_saves_and_fails_after_so_many_skipped_steps_in_a_row(demo, tmp_path):
    broken = BROKEN_TEMPERATURE.replace("* torch.nan", "* (torch.nan if calls.append(1) or len(calls) > 2 else 1)")
    (tmp_path / "plugin.py").write_text(f"calls = []\n{broken}")
    loss = ["loss.name=broken", f"loss.plugin={tmp_path / 'plugin.py'}", "train.max_nonfinite_steps=2"]
    done = train(
        *SMALL, *loss, f"train.output={tmp_path}", "train.name=run", "train.save_every=null", "eval.every_steps=null"
    )
    assert done.returncode == 3 and "Traceback" not in done.stdout, done.stdout
    assert "the last 2 steps were skipped" in done.stdout and "go on with --resume auto" in done.stdout
    assert read_checkpoint(tmp_path / "run").step == 4


def test_a_run_whose_every_step_is_skipped_is_not_done(demo, tmp_path):
    (tmp_path / "plugin.py").write_text(BROKEN_TEMPERATURE)
    loss = ["loss.name=broken", f"loss.plugin={tmp_path / 'plugin.py'}"]
    done = train(*SMALL, *loss, f"train.output={tmp_path}", "train.name=run")
    assert done.returncode != 0 and "Traceback" not in done.stdout, done.stdout
    assert "all 6 steps were skipped" in done.stdout and "Done" not in done.stdout
    assert "step 1: skipped, not finite: d_log_scale on 2 of 2 ranks" in done.stdout
    assert [m["skip_reason"] for m in steps(tmp_path / "run")] == ["d_log_scale on 2 of 2 ranks"] * 6
    assert read_checkpoint(tmp_path / "run").logit_scale == pytest.approx(1 / 0.07)
