"""Communication of a ZeRO-3 step without persisted parameters, counted by DeepSpeed's own comms logger."""

import json

import pytest

from tests.distributed.launch import WORKERS, run_ranks

RANKS = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("gathers") / "results.json"
    run_ranks(WORKERS / "gathers_worker.py", RANKS, out, timeout_s=600)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(found):
    return found["bytes"]


def test_a_step_takes_no_more_than_two_collectives_a_block_and_ten(found):
    """Persisted parameters are gathered together, and a layer's travel together; with k micro-batches of their own k times."""
    counts = found["counts"]
    assert {r["ds_config"] for r in counts} == {"zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_persist_bf16"}
    for result in counts:
        assert 0 < sum(result["collectives"].values()) <= 2 * result["blocks"] + 10, result


def test_bytes_do_not_grow_with_the_number_of_chunks(results):
    results = [r for r in results if r["micro_batches"] == 1 and r["keep"] == "nothing"]
    assert [r["chunk_size"] for r in results] == [None, 3, 1]
    whole, *chunked = [r["bytes"] for r in results]
    for bytes_ in chunked:
        assert bytes_ == whole


def times(result) -> tuple[float, float]:
    """(all-gathers, reduce-scatters) of the step, in units of all parameters and all gradients."""
    gathered = result["bytes"]["all_gather_into_tensor"] * RANKS  # the logger counts the shard
    reduced = result["bytes"]["reduce_scatter_tensor"]  # the logger counts the full buffer, here in fp32
    return gathered / result["parameter_bytes"], reduced / (2 * result["parameter_bytes"])


def test_parameters_are_gathered_at_most_twice_and_gradients_reduced_once(results):
    for result in results:
        if result["micro_batches"] == 1:
            gathers, reductions = times(result)
            assert 0 < gathers <= 2 and reductions == 1


def test_micro_batches_cost_three_gathers_each_but_the_first(results):
    sharded = [r for r in results if r["micro_batches"] > 1 and r["keep"] == "nothing"]
    assert len(sharded) == 2
    for result in sharded:
        gathers, reductions = times(result)
        assert 0 < gathers <= 3 * result["micro_batches"] - 1 and reductions == result["micro_batches"]


def test_weights_kept_until_backward_are_gathered_once_a_backward(results):
    """Also after a first forward without a backward, and whichever towers an evaluation ran, and when."""
    kept = [r for r in results if r["keep"] == "until backward"]
    assert {(r["micro_batches"], *r["evaluated"]) for r in kept} >= {
        (k, *towers) for k in (1, 2) for towers in (("", "", ""), ("image", "", ""), ("", "", "text image"))
    }
    for result in kept:
        k = result["micro_batches"]
        assert times(result) == (k, k), result["evaluated"]


def test_persisted_parameters_and_coalesced_reduction_cost_one_of_each(results):
    persistent = [r for r in results if r["keep"] == "always"]
    assert len(persistent) == 2
    for result in persistent:
        assert times(result) == (1, 1)


def test_the_plan_knows_the_passes(results):
    assert {r["keep"] for r in results} == {"nothing", "until backward", "always"}
    for result in results:
        assert times(result) == tuple(result["planned"])


def test_no_rank_holds_a_full_copy_while_the_model_is_built(results):
    assert all(r["share_held_while_building"] < 0.51 for r in results)
