"""Engine gradients of every loss × every negatives option, cached features or not, equal the dense float64 ones."""

import json

import pytest

from tests.distributed.launch import WORKERS, run_ranks
from tests.distributed.negatives_worker import OPTIONS


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["1 rank", "2 ranks", "4 ranks"])
def results(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("negatives") / "results.json"
    run_ranks(WORKERS / "negatives_worker.py", request.param, out, timeout_s=600)
    *cases, misuse = json.loads(out.read_text())
    assert "called twice after one forward" in misuse["second_backward"]
    assert misuse["by_chunk"] == pytest.approx([misuse["by_chunk"][0]] * 3, rel=1e-6), "FILIP with a queue"
    return cases


def test_every_combination_is_covered(results):
    assert len({(r["loss_name"], r["option"], r["micro_batches"]) for r in results}) == 3 * len(OPTIONS) * 2


def test_gradients_of_encoders_and_scalars(results):
    wrong = [r for r in results if any(value > 1e-5 for key, value in r.items() if key.startswith(("gradient", "d_")))]
    assert not wrong


def test_losses(results):
    assert not [r for r in results if r["loss"] > 1e-5]
