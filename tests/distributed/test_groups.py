"""Rules and layer-wise decay in ZeRO-3 on two ranks: steps and resume against float64, other groups on resume."""

import pytest

from tests.distributed import groups_worker
from tests.distributed.launch import cases_of


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return cases_of(groups_worker, 2, tmp_path_factory.mktemp("groups"))[0]


def test_steps_with_many_groups_and_a_resume_between_agree_with_float64(result):
    assert result["moved"] < 1e-3 and result["worst"] < 1e-2, result


def test_a_checkpoint_of_many_groups_is_read_back_whole(result):
    assert result["read_back"]


def test_on_resume_the_recipe_counts_for_numbers_and_other_groups_are_refused(result):
    assert result["groups"] > 8 and result["smallest"] == 0.25**3 and result["decays"] == [0.0, 0.3]
    assert "parameter groups" in result["refused"] and "optim.layer_decay" in result["refused"]
