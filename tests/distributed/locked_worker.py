"""Run on every rank: locked towers and adapters under each ZeRO stage, their gradients, optimizer, checkpoints; writes one JSON file."""

import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from dsclip.checkpoint import CheckpointStore, find_checkpoint, load_checkpoint, read_checkpoint
from dsclip.config.schema import BatchSection, ModelSection, Recipe, TrainSection
from dsclip.distributed import Collectives
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.whole_tensors import whole_gradients, whole_weights
from dsclip.model import Clip
from dsclip.model.low_rank import MergedWeights
from tests.distributed.checkpoint_worker import NoTokenizer, losses, refusal
from tests.distributed.exactness_worker import (
    CONFIG,
    GLOBAL_BATCH,
    OPTIM,
    SEED,
    ds_config,
    global_batch,
    local_part,
    relative,
)
from tests.distributed.launch import write_cases

CASES = (
    dict(stage=1, bf16=True, lock="image"),
    dict(stage=1, bf16=False, lock="text", unlocked_layers=1),
    dict(stage=2, bf16=True, lock="image", coalesce=True),
    dict(stage=3, bf16=True, lock="image"),
    dict(stage=3, bf16=True, lock="image", unlocked_layers=2),
    dict(stage=3, bf16=False, lock="text", persisted=True),
    dict(stage=1, bf16=True, lora=["blocks"]),
    dict(stage=2, bf16=True, lora=["visual.*attn"], coalesce=True),
    dict(stage=3, bf16=True, lora=["blocks"]),
    dict(stage=3, bf16=False, lora=["visual.blocks.0.mlp", "text.head"], full=["visual.head"]),
)
LORA = 6  # the first case with adapters
RANK, ALPHA = 2, 6.0


def build(
    group,
    *,
    stage,
    bf16,
    lock="none",
    unlocked_layers=0,
    lora=(),
    full=(),
    coalesce=False,
    persisted=False,
    other=False,
    once=None,
):
    """lora, full: what adapters are added to, and what is trained beside them. other: the engine starts from other random weights.
    once: `lock_once`, which is compared without patch dropout."""
    adapters = dict(lora_rank=RANK, lora_alpha=ALPHA, lora_targets=list(lora), lora_full=list(full)) if lora else {}
    recipe = Recipe(
        model=ModelSection(lock=lock, unlocked_layers=unlocked_layers, lock_once=bool(once), **adapters),
        batch=BatchSection(GLOBAL_BATCH, 3, 2, "selective", coalesce_reduction=coalesce),
        optim=OPTIM,
        train=TrainSection(seed=SEED, steps=10, compile="off"),
    )
    settings = ds_config(stage, bf16, group.world_size)
    if persisted:
        settings["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 10**9, "stage3_model_persistence_threshold": 10**9
        }  # fmt: skip
    weights = None
    if other:
        torch.manual_seed(SEED + 1)
        weights = Clip(CONFIG).state_dict()
    return ContrastiveEngine(
        recipe, settings, replace(CONFIG, patch_dropout=0.0 if once is not None else 0.5), state_dict=weights
    )


def gradients(engine, group) -> dict:
    engine.accumulate(local_part(global_batch(0), group))
    found = whole_gradients(engine)
    engine.deepspeed.step()
    engine.close()
    return found


def expected_gradients(ours: dict, everything: dict, start: dict) -> dict:
    """Those of an unlocked run with the same features: adapters begin with B = 0, and with W's gradient G have s·G·Aᵀ for B and 0 for A."""
    expected = {n: everything[n].double() for n in ours if n in everything}
    for name in set(ours) - set(expected):
        layer, _, part = name.rpartition(".lora.")
        if part == "up":
            expected[name] = (
                ALPHA / RANK * everything[f"{layer}.weight"].double() @ start[f"{layer}.lora.down"].double().T
            )
        else:
            expected[name] = torch.zeros_like(ours[name], dtype=torch.float64)
    return expected


def optimizer_numbers(engine, group) -> int:
    """Numbers of AdamW's two moments on all ranks."""
    states = engine.deepspeed.optimizer.optimizer.state.values()
    moments = [x.numel() for state in states for x in state.values() if torch.is_tensor(x) and x.dim()]
    return sum(group.all_gather_object(sum(moments)))


def locked_case(case: dict, everything: dict, group: Collectives, folder: Path) -> dict:
    """everything: the gradients of the same run without lock and adapters."""
    ours = gradients(build(group, **case), group)

    first = build(group, **case)
    start = whole_weights(first)
    frozen = [n for n, p in first.module.named_parameters() if not p.requires_grad]
    seen = losses(first, group, 2)
    store = CheckpointStore(folder, keep=2, tokenizer=NoTokenizer())
    store.save(first, {}, {"model": vars(first.recipe.model)})
    weights = whole_weights(first)
    result = {
        "case": case,
        "gradient": relative(ours, expected_gradients(ours, everything, start)),
        "names": sorted(ours) == sorted(set(start) - set(frozen)),
        "frozen": sorted({n.split(".")[0] for n in frozen}),
        "adapted": sorted({n.rpartition(".lora")[0] for n in ours if ".lora." in n}),
        "trained": sum(g.numel() for g in ours.values()),
        "moved": sorted(n for n in weights if not torch.equal(weights[n], start[n])) == sorted(ours),
        "expected": seen + losses(first, group, 4),
        "optimizer": optimizer_numbers(first, group),
    }
    first.close()
    second = build(group, **case, other=True)  # so that frozen weights are right only if they were loaded
    result["others"] = not any(torch.equal(x, weights[n]) for n, x in whole_weights(second).items() if x.dim() > 1)
    load_checkpoint(second, find_checkpoint(folder), world_size=group.world_size)
    result["loaded"] = all(torch.equal(x, weights[n]) for n, x in whole_weights(second).items())
    result["seen"] = seen + losses(second, group, 4)
    second.close()
    if group.rank == 0:
        read = read_checkpoint(folder).state_dict
        whole = MergedWeights(weights, ALPHA / RANK)
        result["read"] = set(read) == set(whole) and all(torch.equal(read[n], whole[n].cpu()) for n in read)
        result["read_dtypes"] = sorted({str(x.dtype) for x in read.values()})
    group.barrier()
    return result


def once_case(group: Collectives, lock: str) -> dict:
    """Losses of two epochs of two batches with `lock_once`, and without; in the second epoch each rank has the other's samples."""

    def run(once: bool) -> tuple[list[float], int]:
        engine, calls = build(group, stage=3, bf16=False, lock=lock, once=once), []
        tower = {"image": engine.module.visual, "text": engine.module.text}[lock]
        tower.head.register_forward_pre_hook(lambda *_: calls.append(engine.step))
        half = GLOBAL_BATCH // 2
        seen = []
        for step in range(4):
            batch, second = global_batch(step % 2), step >= 2
            order = torch.arange(GLOBAL_BATCH).roll(half * second)
            seen.append(engine.train_step(local_part(batch._map(lambda x, order=order: x[order]), group)).loss)
        engine.close()
        return seen, max(calls)

    (plain, last), (once, last_once) = run(False), run(True)
    return {"plain": plain, "once": once, "ran_last": [last, last_once]}


def cases(group: Collectives) -> list[dict]:
    with TemporaryDirectory() as own:
        found = [own]
        dist.broadcast_object_list(found)  # the ranks' one folder
        results: list[dict] = []
        unlocked: dict[tuple, dict] = {}  # gradients of the runs that train everything
        for i, case in enumerate(CASES):
            plain = {key: value for key, value in case.items() if key in ("stage", "bf16", "coalesce", "persisted")}
            if (key := tuple(plain.items())) not in unlocked:
                unlocked[key] = gradients(build(group, **plain), group)
            results.append(locked_case(case, unlocked[key], group, Path(found[0]) / str(i)))
        for trained_part in (0, LORA):  # continued as a run that trains everything
            engine = build(group, stage=1, bf16=True)
            results.append({"refusal": refusal(engine, Path(found[0]) / str(trained_part))})
        group.barrier()
    results.append({"once": [once_case(group, lock) for lock in ("image", "text")]})
    return results


if __name__ == "__main__":
    write_cases(cases, sys.argv[1])
