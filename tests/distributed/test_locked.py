"""Locked towers on two ranks and every ZeRO stage: gradients, optimizer, exact continuation, whole weights."""

import pytest

from tests.distributed import locked_worker
from tests.distributed.launch import cases_of


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return cases_of(locked_worker, 2, tmp_path_factory.mktemp("locked"))


@pytest.fixture(scope="module")
def results(found):
    return found[:-1]


def test_the_rest_has_the_gradient_of_an_unlocked_run(results):
    for r in results:
        assert r["names"] and r["frozen"] == [{"image": "visual", "text": "text"}[r["case"]["lock"]]]
        assert r["gradient"] == 0, r["case"]  # the same sums in the same order


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
    assert "was trained with model.lock=image model.unlocked_layers=0" in found[-1]["refusal"]
