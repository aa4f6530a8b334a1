"""Run on every rank: steps with many parameter groups, and their resume, against AdamW written out in float64."""

import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dsclip.checkpoint import CheckpointStore, find_checkpoint, load_checkpoint, read_checkpoint
from dsclip.config.schema import BatchSection, OptimSection, Recipe, TrainSection
from dsclip.distributed import Collectives
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.whole_tensors import whole_weights
from dsclip.errors import UserError
from dsclip.model import Clip
from tests.distributed.checkpoint_worker import NoTokenizer
from tests.distributed.exactness_worker import (
    CONFIG,
    GLOBAL_BATCH,
    OPTIM,
    SEED,
    dense_loss,
    ds_config,
    global_batch,
    local_part,
    relative,
)
from tests.distributed.launch import write_cases

RULES = [{"match": r"^text\.", "lr_scale": 0.3}, {"match": r"head\.projection", "weight_decay": 0.0}]
GROUPED = replace(OPTIM, layer_decay=0.5, rules=RULES)
SCALES = {  # by hand, for two blocks of images and one of text
    "visual.embed.": 1 / 8, "visual.blocks.0.": 1 / 4, "visual.blocks.1.": 1 / 2, "visual.head.": 1.0,
    "text.embed.": 0.3 / 4, "text.blocks.0.": 0.3 / 2, "text.head.": 0.3,
}  # fmt: skip


def build(optim: OptimSection, group: Collectives) -> ContrastiveEngine:
    train = TrainSection(seed=SEED, steps=10, compile="off")
    recipe = Recipe(batch=BatchSection(GLOBAL_BATCH), optim=optim, train=train)
    return ContrastiveEngine(recipe, ds_config(3, False, group.world_size), CONFIG)


def reference(weights: dict, log_scale: torch.Tensor, steps: int) -> dict:
    """The weights after so many steps: Adam's update with the name's own learning rate and decay."""
    model = Clip(CONFIG).double()
    model.load_state_dict(weights)
    scale = torch.nn.Parameter(log_scale.detach().double())
    named = {"scale": scale, **dict(model.named_parameters())}
    first, second = ({n: torch.zeros_like(p) for n, p in named.items()} for _ in range(2))
    for step in range(1, steps + 1):
        grads = torch.autograd.grad(
            dense_loss(model, scale, global_batch(step - 1), step - 1, 0.0, torch.float64), list(named.values())
        )
        for (name, p), g in zip(named.items(), grads, strict=True):
            factor = next((x for start, x in SCALES.items() if name.startswith(start)), 1.0)
            still = p.ndim < 2 or name.endswith("position_embedding") or "head.projection" in name
            first[name] = OPTIM.beta1 * first[name] + (1 - OPTIM.beta1) * g
            second[name] = OPTIM.beta2 * second[name] + (1 - OPTIM.beta2) * g * g
            m, v = first[name] / (1 - OPTIM.beta1**step), second[name] / (1 - OPTIM.beta2**step)
            decay = 0.0 if still else OPTIM.weight_decay
            p.data -= OPTIM.lr * factor * (m / (v.sqrt() + OPTIM.eps) + decay * p.data)
    return {n: p.detach() for n, p in model.named_parameters()}


def case(folder: Path, group: Collectives) -> dict:
    """Two steps, a checkpoint, and two more in a fresh engine; then what resuming with other groups does."""
    first = build(GROUPED, group)
    start = {n: w.double() for n, w in whole_weights(first).items()}
    expected = reference(start, first.scalars.log_scale, 4)
    for step in range(2):
        first.train_step(local_part(global_batch(step), group))
    CheckpointStore(folder, keep=1, tokenizer=NoTokenizer()).save(first, {}, asdict(first.recipe))
    half = whole_weights(first)
    first.close()
    path = find_checkpoint(folder)
    read = read_checkpoint(folder).state_dict
    second = build(GROUPED, group)
    load_checkpoint(second, path, world_size=group.world_size)
    for step in range(2, 4):
        second.train_step(local_part(global_batch(step), group))
    ours = whole_weights(second)
    second.close()
    moved = {n: ours[n].double() - start[n] for n in ours}
    result = {
        "read_back": all(torch.equal(read[n], half[n]) for n in half),
        "moved": relative(moved, {n: expected[n] - start[n] for n in ours}),
        "worst": max(relative({n: moved[n]}, {n: expected[n] - start[n]}) for n in ours),
    }
    other = build(replace(GROUPED, layer_decay=0.25, weight_decay=0.3), group)
    load_checkpoint(other, path, world_size=group.world_size)
    groups = other.deepspeed.optimizer.param_groups
    result |= {"groups": len(groups), "decays": sorted({g["weight_decay"] for g in groups})}
    result |= {"smallest": min(g["lr_scale"] for g in groups)}
    other.close()
    plain = build(OPTIM, group)
    try:
        load_checkpoint(plain, path, world_size=group.world_size)
    except UserError as error:
        result["refused"] = str(error)
    plain.close()
    return result


def cases(group: Collectives) -> list[dict]:
    folder = group.broadcast_object(tempfile.mkdtemp() if group.rank == 0 else None)
    return [case(Path(folder), group)]


if __name__ == "__main__":
    write_cases(cases, sys.argv[1])
