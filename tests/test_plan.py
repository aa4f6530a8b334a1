"""The plan: its peak against measured steps, its choices, and that they leave the gradient alone."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.bench.measure import in_process, product_tflops, utilisation
from dsclip.bench.step import make_batch
from dsclip.config import load_ds_config, load_recipe
from dsclip.config.deepspeed import resolve_persistence
from dsclip.config.schema import BatchSection, LossSection, ModelSection, OptimSection, Recipe, TrainSection
from dsclip.distributed import Collectives
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.errors import UserError
from dsclip.model import Clip, resolve_preset
from dsclip.model.flops import forward_flops
from dsclip.model.trained import choose_trained, trained_part
from dsclip.plan import estimate, plan_batch, plan_recipe
from dsclip.plan.advice import advice
from dsclip.plan.estimate import parameter_counts
from dsclip.plan.machine import datasheet_tflops, gpu
from dsclip.plan.workload import Workload
from dsclip.train.resume import keep_planned_sizes
from tests.distributed.launch import alone
from tests.programs import run_program

GPU = gpu(80, datasheet_tflops("NVIDIA H100 80GB HBM3"))


def ds_config(batch: BatchSection, world_size: int, name: str = "zero3") -> dict:
    return load_ds_config(f"ds_configs/{name}_bf16.json", Recipe(batch=batch), world_size)


def plan(preset, batch, world_size=1, machine=GPU, **options):
    return plan_batch(
        resolve_preset(preset), batch, ds_config(batch, world_size), world_size, machine, Workload(**options)
    )


@pytest.mark.parametrize(
    ("preset", "batch", "chunk_size", "stage"),
    [("demo", 64, None, 1), ("demo", 512, 64, 1), ("ViT-S-32", 16, None, 1), ("ViT-S-32", 8, None, 3)],
)
def test_the_planned_peak_is_within_a_tenth_of_the_measured_one(preset, batch, chunk_size, stage):
    settings = dict(
        trainer="dsclip", preset=preset, batch=batch, chunk_size=chunk_size, steps=1, ds_config=f"ds_configs/zero{stage}_bf16.json",
        kind="accumulated" if chunk_size else "plain",
    )  # fmt: skip
    found = in_process("dsclip.bench.step", settings)
    assert found["planned_peak_mb"] == pytest.approx(found["peak_mb"], rel=0.1)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_further_views_take_what_as_many_more_samples_take(checkpointing):
    sizes = dict(checkpointing=checkpointing, accumulation="manual")
    both = plan("ViT-B-32", BatchSection(64, **sizes), further_views=("image_2", "text_2"))[1]
    more = plan("ViT-B-32", BatchSection(128, **sizes))[1]
    plain = plan("ViT-B-32", BatchSection(64, **sizes))[1]
    for part in ("activations", "working_set", "images"):
        assert both.parts[part] == pytest.approx(more.parts[part]) and both.parts[part] > plain.parts[part], part
    assert both.gflops_per_sample == pytest.approx(2 * plain.gflops_per_sample)
    images = plan("ViT-B-32", BatchSection(64, **sizes), further_views=("image_2",))[1]
    assert plain.parts["activations"] < images.parts["activations"] < both.parts["activations"]
    assert images.parts["features"] == pytest.approx(1.5 * plain.parts["features"])


def test_the_copy_of_a_checkpoint_counts_where_it_lies():
    numbers = parameter_counts(resolve_preset("ViT-B-32"))[0]
    whole = 14 * numbers / 1e6  # bf16 weights, float32 masters and two moments
    cpu, batch = replace(GPU, device="cpu"), BatchSection(64)
    on, off = (plan("ViT-B-32", batch, machine=cpu, save_in_background=how)[1] for how in ("on", "auto"))
    assert on.parts["checkpoint_copy"] == pytest.approx(whole) and on.host_mb == 0
    assert on.peak_mb == pytest.approx(off.peak_mb + whole)
    gpu, plain = (plan("ViT-B-32", batch, 4, save_in_background=how)[1] for how in ("auto", "off"))
    assert gpu.host_mb == pytest.approx(whole / 4) and plain.host_mb == 0 and gpu.parts == plain.parts


def test_where_everything_fits_nothing_is_cut_or_computed_again():
    batch, found = plan("ViT-B-32", BatchSection(256))
    assert (batch.micro_batch_size, batch.chunk_size, batch.checkpointing) == (None, None, "none")
    assert found.fits and found.micro_batches == 1 and found.recomputed_gflops_per_sample == 0


@settings(deadline=None, max_examples=60)
@given(
    preset=st.sampled_from(["ViT-B-32", "ViT-L-14", "ViT-bigG-14"]),
    ranks=st.sampled_from([1, 8, 64]),
    local=st.integers(1, 3000),
    memory=st.floats(8, 200),
)
def test_a_plan_fits_or_is_the_smallest_there_is(preset, ranks, local, memory):
    machine = replace(GPU, memory_gb=memory)
    batch, found = plan(preset, BatchSection(local * ranks), ranks, machine)
    again = estimate(resolve_preset(preset), batch, ds_config(batch, ranks), ranks, machine)
    assert again == found, "the batch section says all that the plan decided"
    assert found.fits == (found.peak_mb <= 0.9e3 * memory) and found.peak_mb == pytest.approx(sum(found.parts.values()))
    if not found.fits:
        one = replace(batch, micro_batch_size=1, chunk_size=1, checkpointing="full")
        assert found.peak_mb <= estimate(resolve_preset(preset), one, ds_config(one, ranks), ranks, machine).peak_mb


def test_less_memory_costs_time_never_saves_it():
    rates = [plan("ViT-H-14", BatchSection(8192), 8, replace(GPU, memory_gb=m))[1] for m in (640, 80, 60, 40, 30)]
    assert all(r.fits for r in rates)
    speeds = [r.samples_per_second for r in rates]
    assert speeds == sorted(speeds, reverse=True) and speeds[-1] < speeds[0]


def test_micro_batches_gather_and_reduce_once_where_memory_allows():
    batch, found = plan("ViT-B-32", BatchSection(2**16, micro_batch_size=1024, checkpointing="full"), 8)
    assert found.micro_batches == 8 and batch.coalesce_reduction
    assert (found.gathers_per_step, found.reductions_per_step) == (1, 1)
    zero = resolve_persistence(ds_config(batch, 8), batch)["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] >= 10**12
    batch, found = plan("ViT-B-32", BatchSection(2**16, micro_batch_size=1024, coalesce_reduction=False), 8)
    assert (found.gathers_per_step, found.reductions_per_step) == (8, 8)
    parameters = parameter_counts(resolve_preset("ViT-B-32"))[0]
    assert found.gathered_mb_per_step == pytest.approx(8 * 2 * parameters / 1e6)
    assert found.reduced_mb_per_step == pytest.approx(8 * 4 * parameters / 1e6)
    zero = resolve_persistence(ds_config(batch, 8), batch)["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 0


def test_what_the_user_sets_stays():
    machine = replace(GPU, memory_gb=24)
    batch, found = plan("ViT-L-14", BatchSection(4096, micro_batch_size=1024), 4, machine)
    assert found.micro_batch == 1024 and batch.micro_batch_size in (1024, None)
    batch, found = plan("ViT-L-14", BatchSection(4096, chunk_size=32), 4, machine)
    assert found.chunk == 32 and found.checkpointing == "full"
    batch, found = plan("ViT-L-14", BatchSection(4096, checkpointing="selective"), 4, machine)
    assert found.checkpointing == "selective"
    manual = BatchSection(65536, accumulation="manual")
    assert plan("ViT-L-14", manual, 4, machine)[0] == manual


def test_advice_leads_to_a_plan_that_fits():
    batch, machine = BatchSection(8192, checkpointing="none", accumulation="manual"), replace(GPU, memory_gb=30)
    config = ds_config(batch, 1, "zero1")
    assert not estimate(resolve_preset("ViT-L-14"), batch, config, 1, machine).fits
    changes = advice(resolve_preset("ViT-L-14"), batch, config, 1, machine)
    assert changes and "accumulation: auto" in changes[0]


def test_in_a_ring_features_are_those_of_two_other_ranks_and_advice_knows_it():
    batch, ranks = BatchSection(2**20, micro_batch_size=64, checkpointing="full"), 64
    config, local = resolve_preset("ViT-B-32"), 2**20 // ranks

    def features(gather, world_size=ranks, **loss):
        section = LossSection(gather=gather, **loss)
        return plan("ViT-B-32", batch, world_size, loss=section)[1].parts["features"] * 1e6 / (4 * 512)

    assert features("ring") == 2 * (2 + 3) * local and features("all") == 2 * (ranks + 3) * local
    assert features("ring", hard_negatives="own") == 3 * (2 + 3) * local
    assert features("ring", 1) == features("all", 1) and features("ring", 2) == 2 * (1 + 3) * 2**19
    tight = replace(GPU, memory_gb=0.95 * plan("ViT-B-32", batch, ranks)[1].peak_mb / 900)
    changes = advice(config, batch, ds_config(batch, ranks), ranks, tight)
    assert any("loss.gather=ring" in change for change in changes)


LORA = dict(init="x", lora_rank=8)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "section", [dict(lock="image", init="x"), dict(lock="text", init="x", unlocked_layers=2), LORA]
)
def test_gradients_and_optimizer_are_those_of_what_is_trained(section, stage):
    config, ranks = resolve_preset("ViT-L-14"), 4
    batch = BatchSection(1024, checkpointing="full", accumulation="manual")
    settings = ds_config(batch, ranks, f"zero{stage}")
    with torch.device("meta"):
        model = Clip(config)
        choose_trained(model, ModelSection(**section))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = estimate(config, batch, settings, ranks, GPU)
    part = estimate(
        config, batch, settings, ranks, GPU, Workload(trained=trained_part(config, ModelSection(**section)))
    )
    parameters = parameter_counts(config)[0]
    assert part.parts["optimizer"] == pytest.approx(12 * trained / ranks / 1e6)
    gradients = {n: e.parts["gradients"] for n, e in (("all", everything), ("part", part))}
    shrunk = trained / parameters
    assert gradients["part"] == pytest.approx(gradients["all"] * shrunk, rel=1e-6)
    assert part.reduced_mb_per_step == pytest.approx(everything.reduced_mb_per_step * shrunk)
    assert part.peak_mb < everything.peak_mb and part.samples_per_second > everything.samples_per_second


def test_what_goes_through_the_towers_beside_the_pairs_is_counted():
    config, batch = resolve_preset("ViT-L-14"), BatchSection(256, checkpointing="none", accumulation="manual")
    image, text = forward_flops(config)

    def gflops(**loss):
        work = Workload(loss=LossSection(**loss))
        return estimate(config, batch, ds_config(batch, 1), 1, GPU, work).gflops_per_sample

    assert gflops(hard_negatives="own") == pytest.approx(3 * (image + 2 * text) / 1e9)
    assert gflops(queue_size=512, queue_momentum=0.9) == pytest.approx(4 * (image + text) / 1e9)
    assert gflops(queue_size=512) == pytest.approx(3 * (image + text) / 1e9)


def test_a_locked_layer_saves_nothing_and_is_computed_forward_alone():
    config, batch = resolve_preset("ViT-L-14"), BatchSection(256, checkpointing="none", accumulation="manual")
    settings = ds_config(batch, 1)

    def planned(**section):
        found = trained_part(config, ModelSection(**section))
        return estimate(config, batch, settings, 1, GPU, Workload(trained=found))

    image, text = forward_flops(config)
    assert planned().gflops_per_sample == pytest.approx(3 * (image + text) / 1e9)
    assert planned(lock="image").gflops_per_sample == pytest.approx((image + 3 * text) / 1e9)
    both = planned().parts["activations"]
    assert both == pytest.approx(planned(lock="image").parts["activations"] + planned(lock="text").parts["activations"])
    # Two of 24 blocks, and the head, which the plan takes for nothing.
    last = planned(lock="image", unlocked_layers=3).parts["activations"] - planned(lock="image").parts["activations"]
    assert last == pytest.approx(planned(lock="text").parts["activations"] * 2 / 24, rel=0.02)
    adapters = planned(**LORA)
    assert 1.9 * (image + text) < adapters.gflops_per_sample * 1e9 < 2.1 * (image + text)


def test_a_recipe_is_planned_within_the_memory_it_is_given_and_the_step_is_the_same():
    norms = {}
    for memory_gb in (None, 0.001):
        batch = BatchSection(16, memory_gb=memory_gb)
        recipe = Recipe(batch=batch, optim=OptimSection(warmup_steps=0), train=TrainSection(steps=5))
        config = load_ds_config("ds_configs/zero1_bf16.json", recipe, 1)
        config["bf16"] = {"enabled": False}
        recipe, found = plan_recipe(recipe, config, resolve_preset("demo"), Collectives.single())
        with alone():
            engine = ContrastiveEngine(recipe, config, resolve_preset("demo"))
            metrics = engine.train_step(make_batch(engine.config, 16, 0))
            norms[found.micro_batches, found.checkpointing] = (metrics.grad_norm, metrics.loss)
            engine.close()
    assert len(norms) == 2 and (1, "none") in norms, "the small plan accumulates"
    plain, small = norms.pop((1, "none")), norms.popitem()[1]
    assert small == pytest.approx(plain, rel=1e-5)


def test_the_tool_prints_the_keys_others_rely_on():
    command = (
        "tools/plan.py --preset ViT-B-32 --gpu H100 --gpus 8 --batch 32768 --micro-batch 1024 --chunk-size 32 --json"
    )
    result = json.loads(run_program(*command.split()).stdout)
    assert (result["micro_batch_size"], result["micro_batches"], result["chunk_size"]) == (1024, 4, 32)
    assert {"fits", "peak_mb", "parts", "gathers_per_step", "gflops_per_sample"} <= result.keys()
    assert result["fits"] and sum(result["parts"].values()) == pytest.approx(result["peak_mb"])
    assert result["gflops_per_sample"] == pytest.approx(3 * (8.82 + 5.96), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpu B9000", "Known: B200, H200"),
        ("--gpu B9000 --memory-gb 40", "--peak-tflops"),
        ("--batch 0", "--batch is 0"),
        ("--batch 64 --chunk-size 128", "--chunk-size 128 exceeds the micro-batch of 64"),
        ("--batch 64 --micro-batch 128", "--micro-batch 128 exceeds --batch 64"),
        ("--gpus 0", "--gpus is 0"),
        ("--efficiency 0", "--efficiency"),
        ("--efficiency nan", "--efficiency"),
        ("--gpus 3 --batch 64", "63 or 66"),
    ],
)
def test_wrong_input_of_the_tool_is_named(arguments, message):
    done = run_program("tools/plan.py", *arguments.split(), "--json")
    assert done.returncode == 2 and message in json.loads(done.stdout)["error"] and "Traceback" not in done.stderr


def test_a_recipe_is_planned_with_the_vocabulary_of_its_tokenizer(tokenizer):
    done = run_program("tools/plan.py", "--config", "demo", "--json")
    assert done.returncode == 0, done.stdout
    config = resolve_preset("demo", vocab_size=tokenizer.vocab_size, eot_token_id=tokenizer.eot_token_id)
    with torch.device("meta"):
        assert json.loads(done.stdout)["parameters"] == Clip(config).parameter_count()


def test_utilisation_compares_with_a_product_of_this_run():
    measured = product_tflops("cpu", n=512, repeats=2)
    assert measured > 0
    found = utilisation(measured * 1e12 / 2, measured)
    assert found["measured"] == pytest.approx(0.5)
    assert datasheet_tflops("NVIDIA A100-SXM4-80GB") == 312 and datasheet_tflops("TPU") is None
    assert torch.cuda.is_available() or found["datasheet"] is None


def test_a_wrong_accumulation_is_refused():
    with pytest.raises(UserError, match="batch.accumulation"):
        load_recipe("demo", ["batch.accumulation=automatic"])


@pytest.mark.parametrize("memory_gb", [80, 30, 14])
def test_a_resumed_run_keeps_the_sizes_it_was_planned_with_whatever_is_free(memory_gb):
    batch, world_size = BatchSection(global_batch_size=4096), 4
    first, _ = plan("ViT-B-32", batch, world_size, gpu(memory_gb, 900))
    again = keep_planned_sizes(batch, asdict(first), world_size)
    for free in (10, 25, 80):
        assert plan("ViT-B-32", again, world_size, gpu(free, 900))[0] == first
    assert {plan("ViT-B-32", batch, world_size, gpu(free, 900))[0] for free in (10, 25, 80)} != {first}


def test_a_resumed_run_with_another_batch_or_sizes_of_its_own_is_planned_anew():
    was = {
        "global_batch_size": 64,
        "micro_batch_size": 8,
        "chunk_size": 4,
        "checkpointing": "full",
        "coalesce_reduction": True,
    }
    other = BatchSection(global_batch_size=128)
    assert keep_planned_sizes(other, was, 2) == other
    old = {"samples_per_forward" if key == "micro_batch_size" else key: value for key, value in was.items()}
    same = BatchSection(global_batch_size=64)
    assert keep_planned_sizes(same, old, 2) == keep_planned_sizes(same, was, 2) == BatchSection(**was)
    own = keep_planned_sizes(BatchSection(global_batch_size=64, micro_batch_size=16), was, 2)
    assert (own.micro_batch_size, own.chunk_size, own.checkpointing) == (16, 4, "full")
