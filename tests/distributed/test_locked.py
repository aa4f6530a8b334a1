"""Locked towers and adapters on two ranks and every ZeRO stage: gradients, optimizer, exact continuation, whole weights."""

import pytest

from tests.distributed import locked_worker
from tests.distributed.launch import cases_of


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return cases_of(locked_worker, 2, tmp_path_factory.mktemp("locked"))


@pytest.fixture(scope="module")
def results(found):
    return found[:-3]


def test_the_rest_has_the_gradient_of_an_unlocked_run(results):
    locked = [r for r in results if "lock" in r["case"]]
    for r in locked:
        assert r["names"] and r["frozen"] == [{"image": "visual", "text": "text"}[r["case"]["lock"]]]
        assert r["gradient"] == 0, r["case"]  # the same sums in the same order
    assert len(locked) == 6


def test_adapters_have_the_gradient_that_follows_from_that_of_their_weights(results):
    adapters = [r for r in results if "lora" in r["case"]]
    for r in adapters:
        assert r["names"] and r["adapted"] and r["gradient"] < (2e-2 if r["case"]["bf16"] else 1e-5), r["case"]
    assert {r["case"]["stage"] for r in adapters} == {1, 2, 3}
    assert [len(r["adapted"]) for r in adapters] == [12, 4, 12, 3]


def test_the_optimizer_has_moments_of_what_is_trained_alone(results):
    for r in results:
        padding = 300  # DeepSpeed fills the ranks' shares up
        assert 2 * r["trained"] <= r["optimizer"] <= 2 * r["trained"] + padding, r["case"]


def test_steps_move_what_is_trained_alone(results):
    assert all(r["moved"] for r in results)


def test_a_continued_run_has_the_locked_weights_and_the_same_losses(results):
    for r in results:
        assert r["others"] and r["loaded"], r["case"]
        assert r["seen"] == r["expected"] and len(r["seen"]) == 4, r["case"]


def test_checkpoints_are_read_whole_in_float32(results):
    assert all(r["read"] and r["read_dtypes"] == ["torch.float32"] for r in results)


def test_a_checkpoint_is_not_continued_with_another_lock(found):
    assert "was trained with model.lock=image, to which" in found[-3]["refusal"]
    assert "model.lora_rank=2 model.lora_alpha=6.0, to which" in found[-2]["refusal"]


def test_features_of_a_locked_tower_are_those_of_all_ranks_and_it_does_not_run_again(found):
    for case in found[-1]["once"]:
        assert case["once"] == pytest.approx(case["plain"], rel=1e-6)
        assert case["ran_last"] == [3, 1], "the last step in which the tower ran"
