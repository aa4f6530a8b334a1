"""Run on every rank: gradients and steps of the engine against a float64 reference; writes one JSON file.

The reference is one process with the whole global batch, dense InfoNCE and autograd: a few lines to check by eye.
"""

import itertools
import sys
from dataclasses import replace

import torch
from torch._dynamo.utils import counters

from dsclip.config.schema import BatchSection, LossSection, OptimSection, Recipe, TrainSection
from dsclip.data import Batch
from dsclip.distributed import Collectives
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.whole_tensors import whole_gradients, whole_weights
from dsclip.model import Clip, resolve_preset
from dsclip.model.patch_dropout import visible_patches
from dsclip.optim.groups import parameter_groups
from tests.distributed.launch import write_cases

GLOBAL_BATCH, CONTEXT, SEED = 12, 16, 3
CONFIG = resolve_preset(
    "demo", image_size=32, vision_layers=2, vision_width=64, vision_mlp_width=128, text_layers=1, text_width=32, text_heads=2,
    text_mlp_width=64, embed_dim=24, vocab_size=50, eot_token_id=49, context_length=CONTEXT,
)  # fmt: skip
OTHER_TOWERS = {
    "average": replace(CONFIG, vision_pool="average"),
    "options": replace(
        CONFIG, vision_registers=2, vision_layer_scale=0.1, text_layer_scale=0.1, vision_qk_norm=True, text_qk_norm=True
    ),
    "experts": replace(CONFIG, text_experts=12, text_experts_per_token=2, text_experts_every=1),
    "siglip": replace(CONFIG, vision_pool="attention", text_pool="last", activation="gelu_tanh", embed_dim=64),
}
OPTIM = OptimSection(lr=1e-3, warmup_steps=0, schedule="constant", weight_decay=0.1, eps=1e-6)


def global_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randint(0, 256, (GLOBAL_BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(0, 49, (GLOBAL_BATCH, CONTEXT), generator=generator)
    ends = torch.randint(2, CONTEXT, (GLOBAL_BATCH,), generator=generator)
    tokens[torch.arange(GLOBAL_BATCH), ends] = 49
    return Batch(images, tokens, torch.arange(GLOBAL_BATCH) * 7919 + step)


def local_part(batch: Batch, group: Collectives) -> Batch:
    n = GLOBAL_BATCH // group.world_size
    return batch.rows(group.rank * n, (group.rank + 1) * n)


def dense_loss(model, log_scale, batch, step, patch_dropout, dtype):
    visible = None
    if patch_dropout:
        visible = visible_patches(batch.sample_ids, CONFIG.patches, patch_dropout, seed=SEED, step=step)
    image, text = model(batch.images, batch.tokens, visible_patches=visible)
    logits = log_scale.exp() * image @ text.T
    target = torch.arange(GLOBAL_BATCH)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def reference_gradient(weights, log_scale, batch, step, patch_dropout, dtype=torch.float64, config=CONFIG):
    model = Clip(config).to(dtype)
    model.load_state_dict(weights)
    scale = torch.nn.Parameter(torch.tensor(log_scale, dtype=torch.promote_types(dtype, torch.float32)))
    loss = dense_loss(model, scale, batch, step, patch_dropout, dtype)
    loss.backward()
    return {n: p.grad.double() for n, p in model.named_parameters()}, scale.grad.double(), loss.item()


def relative(ours: dict, reference: dict) -> float:
    difference = sum((ours[n].double() - reference[n]).square().sum() for n in reference)
    return float((difference / sum(g.square().sum() for g in reference.values())).sqrt())


def ds_config(stage: int, bf16: bool, world_size: int) -> dict:
    return {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world_size,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": bf16, "immediate_grad_update": stage == 1},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 1000000,
    }


def build(stage, micro_batches, chunks, patch_dropout, bf16, group, loss=None, special=None) -> ContrastiveEngine:
    local = GLOBAL_BATCH // group.world_size
    micro_batch = local if micro_batches == 1 else -(-local // micro_batches)
    chunk = None if chunks == 1 else max(1, -(-micro_batch // chunks))
    checkpointing = "auto" if micro_batches == 1 else "selective"
    recipe = Recipe(
        batch=BatchSection(GLOBAL_BATCH, micro_batch, chunk, checkpointing, coalesce_reduction=special == "coalesced"),
        optim=OPTIM,
        loss=loss or LossSection(),
        train=TrainSection(seed=SEED, steps=10, compile="on" if special == "compiled" else "off"),
    )
    config = replace(OTHER_TOWERS.get(special, CONFIG), patch_dropout=patch_dropout)
    return ContrastiveEngine(recipe, ds_config(stage, bf16, group.world_size), config)


def gradient_case(case: dict, group: Collectives) -> dict:
    engine = build(**case, group=group)
    batch = global_batch(0)
    counters.clear()
    weights, log_scale = whole_weights(engine), engine.scalars.log_scale.item()
    ours = engine.accumulate(local_part(batch, group))
    grads = whole_gradients(engine)
    experts = experts_found(engine, batch, group) if case.get("special") == "experts" else {}
    config = OTHER_TOWERS.get(case.get("special"), CONFIG)
    reference, d_scale, loss = reference_gradient(weights, log_scale, batch, 0, case["patch_dropout"], config=config)
    result = {
        "gradient": relative(grads, reference),
        "worst_tensor": max(
            relative({n: grads[n]}, {n: reference[n]}) for n in reference if reference[n].norm() > 1e-6
        ),
        "d_log_scale": abs(float(ours.d_log_scale.double() - d_scale) / float(d_scale)),
        "loss": abs(ours.loss.item() - loss),
        "compiled_graphs": counters["stats"]["unique_graphs"],
        **experts,
    }
    if case["bf16"]:
        plain, plain_scale, _ = reference_gradient(weights, log_scale, batch, 0, case["patch_dropout"], torch.bfloat16)
        result["plain_bf16_gradient"] = relative(plain, reference)
        result["plain_bf16_d_log_scale"] = abs(float(plain_scale - d_scale) / float(d_scale))
    engine.deepspeed.step()  # leaves no gradient behind for the next case
    engine.close()
    return result


def experts_found(engine: ContrastiveEngine, batch: Batch, group: Collectives) -> dict:
    """How tokens went to the experts of a gradient, and how their balance then moves, against one pass over the global batch."""
    model = Clip(engine.config).double()
    model.load_state_dict(whole_weights(engine))
    mlp = model.text.blocks[0].mlp
    mlp.counted = torch.zeros(len(mlp.experts), dtype=torch.int64)
    model(None, batch.tokens)
    own = engine._experts._counts[0].clone()
    of_ranks = group.all_gather(own[None])
    engine._experts.step(applied=True)
    moved = (mlp.counted.double().mean() - mlp.counted).sign()
    return {
        "counted": torch.equal(of_ranks.sum(dim=0), mlp.counted),
        "idle": bool(((of_ranks == 0).any(dim=0) & (of_ranks > 0).any(dim=0)).any()),  # an expert of one rank alone
        "balanced": torch.equal(engine.module.text.blocks[0].mlp.balance.double(), moved) and bool(moved.any()),
        "busiest": abs(
            engine._experts.numbers()["expert_text.blocks.0"].item() - float(mlp.counted.max() / mlp.counted.sum())
        ),
    }


def coalesced_case(stage: int, group: Collectives) -> dict:
    """bf16 gradients of one sample after the other, reduced once, against those that ZeRO adds up in float32."""
    gradients = {}
    for special in (None, "coalesced"):
        micro_batches = GLOBAL_BATCH // group.world_size
        engine = build(
            stage, micro_batches=micro_batches, chunks=1, patch_dropout=0.5, bf16=True, group=group, special=special
        )
        engine.accumulate(local_part(global_batch(0), group))
        gradients[special] = whole_gradients(engine)
        engine.deepspeed.step()
        engine.close()
    return {"difference": relative(gradients["coalesced"], {n: g.double() for n, g in gradients[None].items()})}


def wire_case(stage: int, group: Collectives) -> dict:
    """bf16 gradients that are reduced in bf16 against those reduced in fp32, and what a step in bf16 is away from float64."""
    grads, batch = {}, global_batch(0)
    sizes = BatchSection(GLOBAL_BATCH)
    recipe = Recipe(batch=sizes, optim=OPTIM, train=TrainSection(seed=SEED, steps=10, compile="off"))
    for wire in ("fp32", "bf16"):
        settings = ds_config(stage, True, group.world_size) | {"communication_data_type": wire}
        engine = ContrastiveEngine(recipe, settings, CONFIG)
        weights, log_scale = whole_weights(engine), engine.scalars.log_scale.item()
        engine.accumulate(local_part(batch, group))
        grads[wire] = whole_gradients(engine)
        engine.deepspeed.step()
        engine.close()
    reference, _, _ = reference_gradient(weights, log_scale, batch, 0, 0.0)
    return {
        "difference": relative(grads["bf16"], {n: g.double() for n, g in grads["fp32"].items()}),
        "errors": {wire: relative(grads[wire], reference) for wire in grads},
    }


def adamw_case(stage: int, group: Collectives, steps: int = 4) -> dict:
    """Several whole steps: parameters and temperature against float64 AdamW on the same batches."""
    engine = build(stage, micro_batches=2, chunks=2, patch_dropout=0.5, bf16=False, group=group)
    model = Clip(CONFIG).double()
    model.load_state_dict(whole_weights(engine))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    scale = torch.nn.Parameter(engine.scalars.log_scale.detach().double())
    settings = dict(lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)
    groups = [*parameter_groups(model, OPTIM), {"params": [scale], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, **settings)
    for step in range(steps):
        batch = global_batch(step)
        engine.train_step(local_part(batch, group))
        adamw.zero_grad()
        dense_loss(model, scale, batch, step, 0.5, torch.float64).backward()
        adamw.step()
    ours = whole_weights(engine)
    expected = {n: p.detach() for n, p in model.named_parameters()}
    result = {
        "still": [n for n in ours if torch.equal(ours[n].double(), start[n])],
        "parameters": relative(ours, expected),
        "moved": relative({n: ours[n] - start[n] for n in ours}, {n: expected[n] - start[n] for n in ours}),
        "log_scale": abs(engine.scalars.log_scale.item() - scale.item()),
    }
    engine.close()
    return result


def cases(group: Collectives) -> list[dict]:
    results = []
    # Half of all combinations: any three of the four settings meet in every way, under each ZeRO stage.
    for stage, micro_batches, chunks, dropout in itertools.product((1, 2, 3), (1, 3), (1, 2), (0.0, 0.5)):
        bf16 = ((micro_batches == 3) + (chunks == 2) + (dropout > 0)) % 2 == 1
        case = dict(stage=stage, micro_batches=micro_batches, chunks=chunks, patch_dropout=dropout, bf16=bf16)
        results.append({"kind": "gradient", "ranks": group.world_size, **case, **gradient_case(case, group)})
    for stage, special in (
        (2, "coalesced"),
        (3, "coalesced"),
        (3, "average"),
        (3, "siglip"),
        (1, "experts"),
        (2, "experts"),
        (3, "experts"),
        (3, "options"),
        (3, "compiled"),
    ):
        if special in ("options", "compiled") and group.world_size > 1:
            continue  # compiling takes a while, and no rank computes anything else than a single one does
        case = dict(stage=stage, micro_batches=3, chunks=2, patch_dropout=0.5, bf16=False, special=special)
        results.append({"kind": "gradient", "ranks": group.world_size, **case, **gradient_case(case, group)})
    for stage in (2, 3):
        results.append({"kind": "coalesced", "stage": stage, **coalesced_case(stage, group)})
        if group.world_size > 1:
            results.append({"kind": "wire", "stage": stage, **wire_case(stage, group)})
    for stage in (1, 2, 3):
        results.append({"kind": "adamw", "stage": stage, **adamw_case(stage, group)})
    return results


if __name__ == "__main__":
    write_cases(cases, sys.argv[1])
