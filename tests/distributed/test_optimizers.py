"""Each optimizer, and the average of the weights, under ZeRO-1 to 3 on two ranks, with locked towers and parameter groups, against float64."""

import pytest

from tests.distributed import optimizers_worker
from tests.distributed.launch import cases_of

# Moments rounded to bf16 are 2⁻⁸ off at most; a sign may turn where Lion's momentum is rounding noise.
TOLERANCE = {"adamw_bf16": (0.01, 0.02), "lion": (2e-3, 0.03)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return cases_of(optimizers_worker, 2, tmp_path_factory.mktemp("optimizers"), timeout_s=600)


@pytest.fixture(scope="module")
def results(found):
    return found[:-1]


def test_twenty_steps_of_each_optimizer_agree_with_float64_under_each_zero_stage(results):
    assert {(r["name"], r["stage"]) for r in results} >= {
        (name, stage) for name in ("adamw_bf16", "stable_adamw", "lion", "lamb", "muon") for stage in (1, 2, 3)
    }
    for r in results:
        overall, of_a_tensor = TOLERANCE.get(r["name"], (2e-5, 1e-4))
        assert r["moved"] < overall and r["worst"] < of_a_tensor, r


def test_a_resumed_run_goes_on_bit_for_bit_with_its_average(results):
    for r in results:
        assert r["resumed"] and r["average_resumed"], r


def test_the_average_is_saved_by_shard_and_read_whole_with_frozen_weights_as_they_are(results):
    for r in results:
        overall, _ = TOLERANCE.get(r["name"], (2e-5, 0))
        assert r["average"] < overall and r["average_whole"] and abs(r["average_scale"]) < 1e-6, r


def test_stable_adamw_reports_the_rms_of_whole_tensors_and_how_many_were_clipped(results):
    reported = [r for r in results if r["name"] == "stable_adamw"]
    assert len(reported) == 3
    clipped = 0
    for r in reported:
        for ours, expected in zip(r["reports"][1:], r["expected_reports"][1:], strict=True):  # in the first all are 1
            assert ours["update_rms"] == pytest.approx(expected["update_rms"], rel=1e-5)
            assert ours["clipped_tensors"] == expected["clipped_tensors"]
            clipped += ours["clipped_tensors"]
    assert clipped > 10
    assert not any(any(r["reports"]) for r in results if r["name"] != "stable_adamw")


def test_a_checkpoint_is_not_continued_with_another_optimizer(found):
    assert "was trained with optim.name adamw, and lion has another state" in found[-1]["refusal"]
