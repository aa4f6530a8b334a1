"""Run on every rank: steps with numbers that are not finite, in every packaged DeepSpeed configuration; one JSON file."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dsclip.config import load_ds_config
from dsclip.config.schema import BatchSection, LossSection, Recipe, TrainSection
from dsclip.data import Batch
from dsclip.distributed import Collectives, shutdown_distributed
from dsclip.engine.build import init_distributed
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.errors import UserError
from dsclip.losses import register, sigmoid
from dsclip.saving import WriteNow
from tests.distributed.exactness_worker import CONFIG, GLOBAL_BATCH, OPTIM, SEED, global_batch, local_part

CONFIGS = sorted(p.stem for p in Path("ds_configs").glob("*.json"))
NAN, INF = float("nan"), float("inf")
# What is broken, the value, and the ranks it is broken on.
INJECTIONS = {
    "features": ("images", NAN, [1]),
    "feature gradient": ("d_image", NAN, [1]),
    "overflowing gradient": ("d_text", 1e38, [0]),
    "loss": ("loss", NAN, [0, 1]),
    "infinite loss on one rank": ("loss", INF, [1]),
    "d_log_scale": ("d_log_scale", NAN, [0, 1]),
    "d_log_scale on one rank": ("d_log_scale", NAN, [1]),
    "d_log_scale whose square overflows": ("d_log_scale", 1e30, [0, 1]),
    "d_bias": ("d_bias", INF, [0, 1]),
}
# The master weights of ZeRO-1, 2 and 3 in bf16.
FP32 = ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
state = {"injected": None}


def breakable(pairs, *, group, **options):
    """The sigmoid loss, with one number replaced where `injected` says so."""
    grads = sigmoid(pairs, group=group, **options)
    injected = state["injected"]
    if injected is None or injected[0] == "images" or group.rank not in injected[2]:
        return grads
    broken = getattr(grads, injected[0]).clone()
    broken.view(-1)[0] = injected[1]
    return replace(grads, **{injected[0]: broken})


register("breakable", breakable, has_bias=True)


def batch_of(step: int, group: Collectives) -> Batch:
    batch = local_part(global_batch(step), group)
    images = batch.images.float() / 255 - 0.5
    injected = state["injected"]
    if injected is not None and injected[0] == "images" and group.rank in injected[2]:
        images[0, 0, 0, 0] = injected[1]
    return replace(batch, images=images)


def build(name: str, coalesce: bool, group: Collectives) -> ContrastiveEngine:
    local = GLOBAL_BATCH // group.world_size
    recipe = Recipe(
        batch=BatchSection(GLOBAL_BATCH, local // 2, 2, coalesce_reduction=coalesce, accumulation="manual"),
        optim=OPTIM,
        loss=LossSection(name="breakable", queue_size=GLOBAL_BATCH, queue_momentum=0.9),
        train=TrainSection(seed=SEED, steps=100, compile="off"),
    )
    ds_config = load_ds_config(f"ds_configs/{name}.json", recipe, group.world_size)
    return ContrastiveEngine(recipe, ds_config, CONFIG)


def everything(engine) -> dict:
    """All of this rank that a step may change."""
    optimizer = engine.deepspeed.optimizer
    moments = optimizer.optimizer.state.values()
    return {
        "scalars": engine.scalars.state(),
        "queue": [engine.queue.state(), *(x.clone() for x in engine.queue._tensors.values())],
        "average": [x.clone() for x in engine._momentum._average],
        "bf16 weights": [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()],
        "fp32 weights": [x.detach().clone() for name in FP32 for x in getattr(optimizer, name, [])],
        "moments": [x.clone() for group in moments for x in group.values() if torch.is_tensor(x)],
    }


def same(a, b) -> bool:
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def refused_save(engine, group: Collectives) -> str:
    """What saving says when one number of one rank's share of the weights is not finite."""
    weights = list(engine.module.parameters())
    shard = getattr(weights[0], "ds_tensor", weights[0]).data.view(-1)
    if group.rank == 1:
        shard[0] = INF
    try:
        engine.save(Path("nothing is written"), WriteNow())
    except UserError as error:
        return str(error)
    return "saved"


def case(name: str, coalesce: bool, group: Collectives) -> dict:
    engine = build(name, coalesce, group)
    found = {"config": name, "coalesce": coalesce, "injections": {}}
    engine.train_step(batch_of(0, group))
    engine.train_step(batch_of(1, group))
    before = everything(engine)
    for what, state["injected"] in INJECTIONS.items():
        metrics = engine.train_step(batch_of(2, group))
        after = everything(engine)
        changed = sorted(k for k in before if not same(before[k], after[k]))
        found["injections"][what] = {"skipped": metrics.skipped, "reason": metrics.skip_reason, "changed": changed}
    state["injected"] = None
    last = [engine.train_step(batch_of(step, group)) for step in (3, 4)]
    after = everything(engine)
    found["save"] = refused_save(engine, group)
    engine.close()

    undisturbed = build(name, coalesce, group)
    undisturbed.train_step(batch_of(0, group))
    undisturbed.train_step(batch_of(1, group))
    undisturbed.step += len(INJECTIONS)
    expected = [undisturbed.train_step(batch_of(step, group)) for step in (3, 4)]
    wanted = everything(undisturbed)
    undisturbed.close()
    found["different"] = sorted(k for k in wanted if not same(after[k], wanted[k]))
    found["moved"] = sorted(k for k in before if before[k] and not same(before[k], after[k]))
    found["losses"] = [[m.loss, m.grad_norm, m.skipped] for m in last] == [
        [m.loss, m.grad_norm, m.skipped] for m in expected
    ]
    return found


def main(out: str) -> None:
    init_distributed()
    group = Collectives.current()
    cases = [(name, False) for name in CONFIGS] + [("zero3_bf16", True)]
    results = [case(name, coalesce, group) for name, coalesce in cases]
    everyone = group.all_gather_object(results)
    if group.rank == 0:
        Path(out).write_text(json.dumps(everyone))
    shutdown_distributed()


if __name__ == "__main__":
    main(sys.argv[1])
