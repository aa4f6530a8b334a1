"""A step with a number that is not finite leaves no trace, in every packaged DeepSpeed configuration, on every rank."""

import json

import pytest

from tests.distributed.launch import WORKERS, run_ranks

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
