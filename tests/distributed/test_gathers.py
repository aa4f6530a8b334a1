"""Communication of a ZeRO-3 step without persisted parameters, counted by DeepSpeed's own comms logger."""

import json

import pytest

from tests.distributed.launch import WORKERS, run_ranks

RANKS = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("gathers") / "results.json"
    run_ranks(WORKERS / "gathers_worker.py", RANKS, out)
    return json.loads(out.read_text())


def test_bytes_do_not_grow_with_the_number_of_chunks(results):
    assert [r["chunk_size"] for r in results] == [None, 3, 1]
    whole, *chunked = [r["bytes"] for r in results]
    for bytes_ in chunked:
        assert bytes_ == whole


def test_parameters_are_gathered_at_most_twice_and_gradients_reduced_once(results):
    for result in results:
        gathered = result["bytes"]["all_gather_into_tensor"] * RANKS  # the logger counts the shard
        assert 0 < gathered <= 2 * result["parameter_bytes"]
        reduced_fp32 = result["bytes"]["reduce_scatter_tensor"]  # the logger counts the full buffer
        assert reduced_fp32 == 2 * result["parameter_bytes"]


def test_no_rank_holds_a_full_copy_while_the_model_is_built(results):
    assert all(r["share_held_while_building"] < 0.51 for r in results)
