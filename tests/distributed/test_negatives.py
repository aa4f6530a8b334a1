"""Engine gradients of every loss × every negatives option on every number of ranks equal the dense float64 ones.

Pairwise beyond that: `combinations` in the worker runs each of loss × option with cached features or without, so that each
pair of loss, option, micro-batches and ranks is covered, and each loss × option × micro-batches on some number of ranks.
"""

import itertools

import pytest

from tests.distributed import negatives_worker
from tests.distributed.launch import cases_of
from tests.distributed.negatives_worker import EVERY, combinations

RANKS = (1, 2, 4)


@pytest.fixture(scope="module", params=RANKS, ids=["1 rank", "2 ranks", "4 ranks"])
def results(request, tmp_path_factory):
    *cases, misuse = cases_of(negatives_worker, request.param, tmp_path_factory.mktemp("negatives"), timeout_s=600)
    assert "called twice after one forward" in misuse["second_backward"]
    assert misuse["by_chunk"] == pytest.approx([misuse["by_chunk"][0]] * 3, rel=1e-6), "FILIP with a queue"
    return cases


def test_every_pair_is_covered(results):
    found = [(r["loss_name"], r["option"], r["micro_batches"]) for r in results]
    for one, two in itertools.combinations(range(3), 2):
        assert {(f[one], f[two]) for f in found} == {(f[one], f[two]) for f in EVERY}


def test_every_three_are_covered_on_some_number_of_ranks():
    found = {case for ranks in RANKS for case in combinations(ranks)}
    assert found == set(EVERY)


def test_gradients_of_encoders_and_scalars(results):
    wrong = [r for r in results if any(value > 1e-5 for key, value in r.items() if key.startswith(("gradient", "d_")))]
    assert not wrong


def test_losses(results):
    assert not [r for r in results if r["loss"] > 1e-5]
