"""The first test of all: a step equals the float64 single-process step on the whole global batch."""

import itertools

import pytest

from tests.distributed import exactness_worker
from tests.distributed.launch import cases_of


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request, tmp_path_factory):
    return cases_of(exactness_worker, request.param, tmp_path_factory.mktemp("exactness"), timeout_s=900)


def test_coalesced_and_compiled_steps_and_other_towers_are_among_them(results):
    gradients = [r for r in results if r["kind"] == "gradient"]
    special = {(r["stage"], r["special"]) for r in gradients if r.get("special")}
    alone = {(3, "options"), (3, "compiled")} if gradients[0]["ranks"] == 1 else set()
    experts = {(stage, "experts") for stage in (1, 2, 3)}
    assert special == {(2, "coalesced"), (3, "coalesced"), (3, "average"), (3, "siglip")} | experts | alone
    # Graphs that TorchDynamo made of code that then ran in their place: in these steps, and in no other.
    assert not failures(gradients, lambda r: (r["compiled_graphs"] > 0) != (r.get("special") == "compiled"))


def failures(results, wrong) -> list:
    assert results, "the worker reported no case"
    return [case for case in results if wrong(case)]


def test_any_three_settings_meet_in_every_way_under_each_stage(results):
    plain = [r for r in results if r["kind"] == "gradient" and not r.get("special")]
    for three in itertools.combinations(("micro_batches", "chunks", "patch_dropout", "bf16"), 3):
        assert len({(r["stage"], *(r[key] for key in three)) for r in plain}) == 3 * 2**3, three


def test_fp32_gradients_equal_float64_full_batch(results):
    fp32 = [r for r in results if r["kind"] == "gradient" and not r["bf16"]]
    keys = ("gradient", "worst_tensor", "d_log_scale", "loss")
    assert not failures(fp32, lambda r: any(r[k] > 1e-5 for k in keys))


def test_tokens_are_counted_once_and_move_the_balance_alike_also_where_an_expert_of_a_rank_is_idle(results):
    routed = [r for r in results if r.get("special") == "experts"]
    assert len(routed) == 3
    assert not failures(routed, lambda r: not (r["counted"] and r["balanced"]) or r["busiest"] > 1e-6)
    assert all(r["idle"] == (r["ranks"] > 1) for r in routed), "with two ranks a gradient of zeros must meet another's"


def test_bf16_gradients_are_as_good_as_a_plain_bf16_full_batch_step(results):
    bf16 = [r for r in results if r["kind"] == "gradient" and r["bf16"]]
    assert not failures(bf16, lambda r: r["gradient"] > 2 * r["plain_bf16_gradient"])
    assert not failures(bf16, lambda r: r["d_log_scale"] > 2 * r["plain_bf16_d_log_scale"])


def test_coalesced_bf16_gradients_are_added_in_float32_and_rounded_once(results):
    """Half a unit of bf16's last place is 2⁻⁹ of a number; added in bf16 they were twice as far apart and more."""
    coalesced = [r for r in results if r["kind"] == "coalesced"]
    assert len(coalesced) == 2 and not failures(coalesced, lambda r: r["difference"] > 2**-9)


def test_a_reduction_in_bf16_adds_little_to_the_error_of_a_bf16_step(results):
    wires = [r for r in results if r["kind"] == "wire"]
    assert len(wires) == (2 if results[0]["ranks"] > 1 else 0)
    assert all(0 < r["difference"] < 2**-8 and r["errors"]["bf16"] < 1.05 * r["errors"]["fp32"] for r in wires), wires


def test_every_parameter_moves_with_the_steps(results):
    assert not failures([r for r in results if r["kind"] == "adamw"], lambda r: r["still"])


def test_several_adamw_steps_agree_with_float64(results):
    steps = [r for r in results if r["kind"] == "adamw"]
    # Adam divides by the root of the second moment, so the rounding of tiny gradients shows in the movement.
    assert not failures(steps, lambda r: r["parameters"] > 1e-5 or r["moved"] > 1e-3 or r["log_scale"] > 1e-6)
