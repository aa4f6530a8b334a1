"""The simulated step: against sums by eye and the counted passes, between its bounds; and what the plan prints of it."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.config import load_ds_config
from dsclip.config.deepspeed import resolve_persistence
from dsclip.config.schema import BatchSection, Recipe
from dsclip.model import resolve_preset
from dsclip.plan.estimate import parameter_counts, passes
from dsclip.plan.interconnect import HOP_SECONDS, Interconnect
from dsclip.plan.machine import named_gpu
from dsclip.plan.measured import measured
from dsclip.plan.schedule import BF16, FP32, Part, Way, parts_of, simulate, way
from tests.programs import run_program

GIGA = 10**9


class Wire(Interconnect):
    """A link by eye: a second for a byte, whoever shares it."""

    def seconds(self, size):
        return float(size)


SLOW = Wire("400g", 1, 2)
WAY = Way(1, 1, 0.0, True, True, False, bucket=1, prefetch=10, wire=2)


def test_a_step_of_two_layers_by_eye():
    """Layers of 3 parameters, 10 s a forward: 6 s a gather, 6 s a reduction. G gathers, F forward, B backward, R reduces.

    link:    G1 0-6, G2 6-12            R2 46-52  R1 66-72
    device:  F1 6-16, F2 16-26, B2 26-46, B1 46-66, waits until 72
    """
    step = simulate([Part(3, 10), Part(3, 10)], WAY, 1, SLOW)
    assert (step.seconds, step.busy) == (72, 60)
    assert {k: v for k, v in step.waits.items() if v} == {"weights, forward": 6, "gradients, after backward": 6}


def test_without_prefetch_a_gather_waits_for_the_layer_before():
    step = simulate([Part(3, 10), Part(3, 10)], replace(WAY, prefetch=0), 1, SLOW)
    assert step.waits["weights, forward"] == 12, "the second is asked for when the first is done"


def test_one_bucket_for_all_is_reduced_after_backward():
    step = simulate([Part(3, 10), Part(3, 10)], replace(WAY, bucket=100), 1, SLOW)
    assert step.waits["gradients, after backward"] == 12


@settings(deadline=None, max_examples=80)
@given(
    preset=st.sampled_from(["ViT-B-32", "ViT-L-14"]), ds=st.sampled_from(["zero1", "zero2", "zero3", "zero3_persist"]),
    k=st.integers(1, 4), recomputed=st.floats(0, 1), bandwidth=st.floats(0.1, 1000), coalesce=st.booleans(), keeps=st.booleans(),
)  # fmt: skip
def test_a_step_lies_between_the_longer_of_its_queues_and_their_sum(
    preset, ds, k, recomputed, bandwidth, coalesce, keeps
):
    config, net = resolve_preset(preset), Interconnect("400g", 4, 8, bandwidth)
    coalesce = coalesce and ds != "zero1"
    batch = BatchSection(32 * 8 * k, 8 if k > 1 else None, coalesce_reduction=coalesce)
    ds_config = resolve_persistence(load_ds_config(f"{ds}_bf16", Recipe(batch=batch), 32), batch)
    if not keeps and ds == "zero3":
        ds_config["zero_optimization"]["stage3_max_reuse_distance"] = 0
    parameters, _ = parameter_counts(config)
    parts = parts_of(config, 24)
    order = way(ds_config, parameters, 8 * k, k, recomputed, coalesce)
    step = simulate(parts, order, 1e14, net)
    work = 8 * k * sum(p.flops for p in parts) / 1e14
    assert step.busy == pytest.approx(work * (3 + recomputed + (k - 1) / k))
    gathers, reductions = passes(parameters, batch, ds_config, 32, k)
    sent = (gathers * BF16 + reductions * FP32) * parameters * 31 / 32 / (bandwidth * GIGA)
    hops = (gathers + reductions) * len(parts) * 4 * HOP_SECONDS
    assert max(step.busy, sent) <= step.seconds * (1 + 1e-9) and step.seconds <= step.busy + sent + hops
    assert step.seconds == pytest.approx(step.busy + sum(step.waits.values()))
    idle = simulate(parts, order, 1e30, net)
    assert idle.seconds == pytest.approx(sent, abs=hops + 1e-9), "as many passes travel as the plan counts"


def test_all_parameters_and_operations_are_in_the_layers():
    config = resolve_preset("ViT-B-16")
    assert sum(p.parameters for p in parts_of(config, None)) == parameter_counts(config)[0]


def bench(folder, date, card="NVIDIA H100 80GB HBM3", rate=800.0, **changes):
    step = {"samples_per_second": rate, "gflops_per_sample": 500.0, "recomputed_gflops_per_sample": 0.0}
    found = {"device": "cuda", "card": card, "tiny": False, "facts": {"step ViT-L-14": step}} | changes
    (folder / f"{date}.json").write_text(json.dumps(found))


def test_the_newest_measurement_of_this_card_and_preset_gives_the_efficiency(tmp_path):
    h100 = named_gpu("H100")
    assert measured(h100, "ViT-L-14", tmp_path) is None
    bench(tmp_path, "2027-01-01"), bench(tmp_path, "2027-01-02", rate=900.0)
    bench(tmp_path, "2027-01-03", card="NVIDIA H200"), bench(tmp_path, "2027-01-04", tiny=True)
    bench(tmp_path, "2027-01-05", device="cpu")
    found = measured(h100, "ViT-L/14", tmp_path)
    assert found.efficiency == pytest.approx(900 * 500e9 / 989e12) and found.source == "2027-01-02.json"
    assert measured(h100, "ViT-B-32", tmp_path) is None and measured(named_gpu("A100"), "ViT-L-14", tmp_path) is None


def test_the_plan_prints_where_a_step_waits_and_draws_mfu(tmp_path):
    command = "tools/plan.py --preset ViT-B-32 --gpu H100 --nodes 4 --interconnect 100g --batch 16384 --text-tokens 24 --figure"
    done = run_program(*command.split(), tmp_path / "mfu.svg")
    assert done.returncode == 0 and "gradients, after backward" in done.stdout and "not measured" in done.stdout
    result = json.loads(run_program(*command.split(), tmp_path / "mfu.svg", "--json").stdout)
    assert [p["gpus"] for p in result["scaling"]] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert result["overlap"] == result["scaling"][2], "32 GPUs are among them"
    mfu = [p["mfu"] for p in result["scaling"]]
    assert mfu == sorted(mfu, reverse=True) and 0 < mfu[-1] < mfu[0] <= 0.4, "more GPUs wait longer"
    figure = (tmp_path / "mfu.svg").read_text()
    assert figure.startswith("<svg") and figure.count("<circle") == 8


def test_nodes_of_three_gpus_are_planned_for_one_to_eight_nodes():
    command = (
        "tools/plan.py --preset ViT-B-32 --gpu H100 --nodes 2 --gpus-per-node 3 --interconnect 100g --batch 768 --json"
    )
    assert [p["gpus"] for p in json.loads(run_program(*command.split()).stdout)["scaling"]] == [
        3 * n for n in range(1, 9)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nodes 2", "need --gpu"),
        ("--gpu H100 --gpus 12 --interconnect 400g", "no multiple of --gpus-per-node 8"),
        ("--gpu H100 --gpus 12 --nodes 2", "2 nodes of 8 are 16"),
        ("--gpu H100 --figure x.svg", "--interconnect"),
        ("--gpu H100 --nodes 0", "--nodes is 0"),
        ("--gpu H100 --nodes 2 model.lora_rank=4 model.init=x", "leave out model.lock, model.lora_rank"),
        (
            '--gpu H100 --nodes 2 objective.terms=[{"name":"contrast","between":["image","image_2"]}]',
            "terms over further views",
        ),
    ],
)
def test_contradictions_are_named(arguments, message):
    done = run_program("tools/plan.py", *arguments.split(), "--json")
    assert done.returncode == 2 and message in json.loads(done.stdout)["error"]
