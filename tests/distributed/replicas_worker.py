"""Run on every rank: one bit, or one number, of what must be equal on all ranks is changed on rank 1; writes one JSON file."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from dsclip.config.schema import BatchSection, LossSection, Recipe, TrainSection
from dsclip.distributed import Collectives
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.errors import RunFailed
from tests.distributed.exactness_worker import CONFIG, GLOBAL_BATCH, OPTIM, SEED, ds_config, global_batch, local_part
from tests.distributed.launch import write_cases

NAME = "text.blocks.0.attn.qkv.weight"


def build(stage: int, group: Collectives) -> ContrastiveEngine:
    recipe = Recipe(
        batch=BatchSection(GLOBAL_BATCH), optim=OPTIM, loss=LossSection(queue_size=GLOBAL_BATCH, queue_momentum=0.9),
        train=TrainSection(seed=SEED, steps=10, compile="off", replica_check_every=3),
    )  # fmt: skip
    settings = ds_config(stage, True, group.world_size)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 10**9
    return ContrastiveEngine(recipe, settings, CONFIG)


@contextlib.contextmanager
def changed(x: torch.Tensor, group: Collectives) -> Iterator[None]:
    """The lowest bit of one of its numbers is flipped on rank 1."""
    bits = x.detach().view(-1).view({2: torch.int16, 4: torch.int32}[x.element_size()])
    bits[len(bits) // 2] ^= group.rank
    yield
    bits[len(bits) // 2] ^= group.rank


def case(stage: int, group: Collectives) -> dict:
    engine = build(stage, group)
    batch = replace(local_part(global_batch(0), group), state={"batches": 1, "order": {"seed": SEED}})

    def said(batch=batch) -> str:
        try:
            engine.check_replicas(batch)
        except RunFailed as error:
            told = group.all_gather_object(str(error))
            return f"RunFailed: {error}" if len(set(told)) == 1 else f"ranks say different things: {told}"
        return ""

    engine.train_step(batch)
    found, weight = {}, dict(engine.module.named_parameters())[NAME]
    with changed(weight.data, group):
        found["weight"] = said()
    with changed(engine.scalars.log_scale, group):
        found["log_scale"] = said()
    with changed(engine.scalars.replicated()["log_scale.exp_avg"], group):
        found["moment"] = said()
    with changed(engine.queue.replicated()["queue.text"], group):
        found["queue"] = said()
    if stage < 3:
        with changed(engine._momentum.replicated()[f"average of {NAME}"], group):
            found["average"] = said()
    found["order"] = said(replace(batch, state={"batches": 1, "order": {"seed": SEED + group.rank}}))
    equal, trained = said() == "", ""
    with changed(engine.scalars.log_scale, group):
        for _ in range(2):
            try:
                engine.train_step(batch)
            except RunFailed as error:
                trained = str(error).partition(":")[0]
    engine.close()
    return {"stage": stage, "said": found, "equal": equal, "trained": trained}


if __name__ == "__main__":
    write_cases(lambda group: [case(stage, group) for stage in (1, 2, 3)], sys.argv[1])
