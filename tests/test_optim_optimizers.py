"""Optimizers by name, on one rank: Muon's iteration, rounding by chance, what they keep in memory, and what is refused."""

import pytest
import torch

from dsclip.config import load_ds_config, load_recipe
from dsclip.config.deepspeed import OFFLOADED
from dsclip.config.schema import BatchSection, ModelSection, OptimSection, Recipe, TrainSection
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.whole_tensors import whole_weights
from dsclip.errors import UserError
from dsclip.model import Clip, resolve_preset
from dsclip.model.trained import trained_part
from dsclip.optim.adamw_bf16 import by_chance
from dsclip.optim.muon import orthogonalised
from dsclip.plan import estimate
from dsclip.plan.estimate import parameter_counts
from dsclip.plan.machine import gpu
from dsclip.plan.optimizer_state import kept_bytes
from dsclip.plan.workload import Workload
from tests.distributed.exactness_worker import CONFIG, GLOBAL_BATCH, ds_config, global_batch
from tests.distributed.launch import alone

NAMES = ("adamw", "adamw_bf16", "stable_adamw", "lion", "lamb", "muon")


def recipe_of(optim: OptimSection) -> Recipe:
    return Recipe(batch=BatchSection(GLOBAL_BATCH), optim=optim, train=TrainSection(steps=10, compile="off"))


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_muons_iteration_keeps_singular_vectors_and_makes_singular_values_about_one(shape):
    matrices = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonalised(matrices) @ vh.mT
    values = found.diagonal(dim1=1, dim2=2)
    assert (found - torch.diag_embed(values)).abs().max() < 1e-9
    assert values[s > 0.01 * s.amax(dim=1, keepdim=True)].min() > 0.6 and values.max() < 1.25


def test_a_step_of_muon_is_torchs_to_the_bf16_that_torch_computes_in():
    weight = torch.nn.Parameter(torch.zeros(24, 64))
    weight.grad = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    ours = -0.2 * 64**0.5 * orthogonalised(weight.grad[None])[0]
    assert (weight.detach() - ours).norm() < 0.02 * ours.norm()


def test_rounding_by_chance_is_right_on_average_and_leaves_bf16_numbers_alone():
    x = torch.tensor([1.0 + 1 / 1024, -3.003, 1e-20, 0.0])
    noise = torch.Generator().manual_seed(0)
    drawn = torch.stack([by_chance(x, noise).float() for _ in range(4000)])
    assert torch.allclose(drawn.mean(0), x, rtol=3e-4)
    assert len(drawn[:, 0].unique()) == 2
    exact = torch.randn(1000, generator=noise).bfloat16()
    assert torch.equal(by_chance(exact.float(), noise), exact)


def test_a_second_moment_in_bf16_falls_where_rounding_to_the_nearest_would_hold_it():
    by_luck = nearest = torch.ones(2000).bfloat16()
    noise = torch.Generator().manual_seed(1)
    for _ in range(500):
        by_luck, nearest = by_chance(by_luck.float() * 0.999, noise), (nearest.float() * 0.999).bfloat16()
    assert nearest.float().mean() == 1
    assert by_luck.float().mean().item() == pytest.approx(0.999**500, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_what_an_optimizer_keeps_is_what_the_plan_counts(name):
    optim = OptimSection(name=name, warmup_steps=0, ema=0.9)
    with alone():
        engine = ContrastiveEngine(recipe_of(optim), ds_config(3, True, 1), CONFIG)
        engine.train_step(global_batch(0))
        zero = engine.deepspeed.optimizer
        masters = sum(4 * x.numel() for x in zero.fp32_partitioned_groups_flat)
        state = [x for of in zero.optimizer.state.values() for x in of.values() if torch.is_tensor(x) and x.dim()]
        kept = masters + sum(x.numel() * x.element_size() for x in state)
        average = engine._average.bytes
        engine.close()
    part = trained_part(CONFIG, ModelSection())
    assert kept_bytes(part.parameters, part.matrices, optim) == (kept, average)
    with torch.device("meta"):
        model = Clip(CONFIG)
    matrices = sum(
        p.numel()
        for tower in (model.visual, model.text)
        for block in tower.blocks
        for p in block.parameters()
        if p.dim() == 2
    )
    assert part.matrices == matrices and kept_bytes(1, 1, OptimSection(name=name))[1] == 0


def test_a_ranks_share_of_state_and_average_is_in_the_plan():
    config, recipe = resolve_preset("ViT-L-14"), Recipe(batch=BatchSection(4096))
    settings = load_ds_config("ds_configs/zero3_bf16.json", recipe, 8)
    machine, numbers = gpu(80, 989), parameter_counts(config)[0] / 8e6
    for name, kept in {"adamw": 12, "adamw_bf16": 8, "stable_adamw": 12, "lion": 8, "lamb": 12}.items():
        parts = estimate(
            config, recipe.batch, settings, 8, machine, Workload(optim=OptimSection(name=name, ema=0.99))
        ).parts
        assert parts["optimizer"] == pytest.approx(kept * numbers) and parts["weight_average"] == pytest.approx(
            4 * numbers
        )
    plain = estimate(config, recipe.batch, settings, 8, machine).parts
    assert plain["optimizer"] == pytest.approx(12 * numbers) and "weight_average" not in plain
    muon = estimate(config, recipe.batch, settings, 8, machine, Workload(optim=OptimSection(name="muon"))).parts[
        "optimizer"
    ]
    assert 8 * numbers < muon < 9 * numbers  # the blocks are nearly all of it


def test_what_no_run_could_obey_is_refused_before_anything_is_built():
    with pytest.raises(UserError, match=r"`optim.momentum` is 0.9; it belongs to `optim.name: muon`"):
        load_recipe("demo", ["optim.momentum=0.9"])
    with pytest.raises(UserError, match=r"Choose from: adamw, adamw_bf16, stable_adamw, lion, lamb, muon"):
        load_recipe("demo", ["optim.name=adam"])
    recipe = load_recipe("demo", ["optim.name=lamb"])
    with pytest.raises(
        UserError, match=r"remove `zero_optimization.offload_optimizer`, or .* lamb looks at whole tensors"
    ):
        load_ds_config("ds_configs/zero3_offload_bf16.json", recipe, 1)


@pytest.mark.parametrize("name", OFFLOADED)
def test_an_offloaded_optimizer_takes_the_same_steps(name):
    weights = []
    for offload in ("none", "cpu"):
        settings = ds_config(3, True, 1)
        settings["zero_optimization"]["offload_optimizer"] = {"device": offload}
        with alone():
            engine = ContrastiveEngine(recipe_of(OptimSection(name=name, warmup_steps=0, ema=0.9)), settings, CONFIG)
            for step in range(2):
                engine.train_step(global_batch(step))
            weights.append([v.clone() for v in (*engine._average.pieces().values(), *whole_weights(engine).values())])
            engine.close()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
