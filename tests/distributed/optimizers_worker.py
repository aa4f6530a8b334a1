"""Run on every rank: 20 steps of each optimizer under each ZeRO stage, with average and resume, against float64."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dsclip.checkpoint import CheckpointStore, load_checkpoint, read_checkpoint
from dsclip.config.schema import BatchSection, ModelSection, OptimSection, Recipe, TrainSection
from dsclip.distributed import Collectives
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.whole_tensors import whole_gradients, whole_weights
from tests.distributed.checkpoint_worker import NoTokenizer, refusal
from tests.distributed.exactness_worker import CONFIG, GLOBAL_BATCH, SEED, ds_config, global_batch, local_part, relative
from tests.distributed.launch import write_cases
from tests.optimizer_reference import step as reference_step

SETTINGS = ((1, True, "none"), (2, False, "text"), (3, True, "image"))  # ZeRO stage, bf16, locked tower
# torch's AdamW is compared with float64 by the neighbours, too.
CASES = [("adamw", SETTINGS[2:]), *((n, SETTINGS) for n in ("adamw_bf16", "stable_adamw", "lion", "lamb", "muon"))]
STEPS, SAVED, EMA = 20, 17, 0.6  # of a run, until its checkpoint
SMALL = replace(CONFIG, vision_layers=1)
RULES = [{"match": r"attn\.out", "weight_decay": 0.0}, {"match": r"mlp", "lr_scale": 0.5}]
# β₂ such that StableAdamW clips
OPTIM = OptimSection(
    lr=3e-3, warmup_steps=0, schedule="constant", weight_decay=0.1, beta2=0.9, layer_decay=0.7, rules=RULES, ema=EMA
)


def build(group: Collectives, name: str, stage: int, bf16: bool, lock: str, **changes) -> ContrastiveEngine:
    recipe = Recipe(
        model=ModelSection(lock=lock, unlocked_layers=1 if lock != "none" else 0), batch=BatchSection(GLOBAL_BATCH),
        optim=replace(OPTIM, name=name, **changes), train=TrainSection(seed=SEED, steps=STEPS, compile="off"),
    )  # fmt: skip
    settings = ds_config(stage, bf16, group.world_size)
    if stage == 3:  # several vectors a group
        settings["zero_optimization"]["sub_group_size"] = 500
    return ContrastiveEngine(recipe, settings, SMALL)


def run(engine: ContrastiveEngine, group: Collectives, steps: int) -> list[dict]:
    """Trains to that step; returns the gradients and the optimizer's report of each step."""
    seen, apply = [], engine.deepspeed.step

    def record() -> None:
        seen.append(whole_gradients(engine))
        apply()

    engine.deepspeed.step = record
    after = []
    for step in range(engine.step, steps):
        report = engine.train_step(local_part(global_batch(step), group)).optimizer
        after.append({"report": report, "log_scale": engine.scalars.log_scale.item()})
    engine.deepspeed.step = apply
    return [{"gradients": g} | a for g, a in zip(seen, after, strict=True)]


def reference(name: str, start: dict, steps: list[dict], scales: dict, decays: dict) -> tuple[dict, dict, list[dict]]:
    """Weights; their average and the log scale's at the checkpoint; StableAdamW's report of each step.

    From the gradients that the engine had: what they should be is for other tests.
    """
    weights = {n: w.double().clone() for n, w in start.items()}
    average = {n: w.clone() for n, w in weights.items()} | {"log_scale": torch.tensor(1 / 0.07).log().double()}
    states, reports = {n: {} for n in weights}, []
    for t, taken in enumerate(steps, start=1):
        for n, g in taken["gradients"].items():
            reference_step(name, weights[n], g.double(), states[n], t, OPTIM.lr * scales[n], decays[n], OPTIM, n)
        if t <= SAVED:
            decay = min(EMA, (1 + t) / (10 + t))
            now = weights | {"log_scale": taken["log_scale"]}
            average = {n: decay * average[n] + (1 - decay) * w for n, w in now.items()}
        rms = [s["rms"].item() for s in states.values() if "rms" in s]
        reports.append({"update_rms": max(rms), "clipped_tensors": sum(r > 1 for r in rms)} if rms else {})
    return weights, average, reports


def of_groups(engine: ContrastiveEngine) -> tuple[dict, dict]:
    """By hand: the factor on the learning rate and the decay of each parameter."""
    scales, decays = {}, {}
    for n, p in engine.module.named_parameters():
        _, part, *rest = n.split(".")
        above = {"head": 0, "blocks": 1, "embed": 2}[part]  # towers of one block
        scales[n] = 0.7**above * (0.5 if "mlp" in n else 1.0)
        still = len(getattr(p, "ds_shape", p.shape)) < 2 or rest[-1] in ("position_embedding", "class_embedding")
        decays[n] = 0.0 if still or "attn.out" in n else 0.1
    return scales, decays


def case(folder: Path, group: Collectives, name: str, stage: int, bf16: bool, lock: str) -> dict:
    first = build(group, name, stage, bf16, lock)
    start, (scales, decays) = whole_weights(first), of_groups(first)
    taken = run(first, group, SAVED)
    path = CheckpointStore(folder, keep=1, tokenizer=NoTokenizer()).save(first, {}, asdict(first.recipe))
    half = whole_weights(first)
    taken += run(first, group, STEPS)
    ours, averages = whole_weights(first), first._average.pieces()
    first.close()
    second = build(group, name, stage, bf16, lock)
    load_checkpoint(second, path, world_size=group.world_size)
    for step in range(SAVED, STEPS):
        second.train_step(local_part(global_batch(step), group))
    again, averages_again = whole_weights(second), second._average.pieces()
    second.close()

    weights, average, reports = reference(name, start, taken, scales, decays)
    read, trained = read_checkpoint(path, average=True), taken[0]["gradients"]
    moved, expected = ({n: w[n].double() - start[n] for n in trained} for w in (ours, weights))
    averaged, expected_average = ({n: w[n].double() - start[n] for n in trained} for w in (read.state_dict, average))
    same = averages.keys() == averages_again.keys() and all(
        torch.equal(averages[n], averages_again[n]) for n in averages
    )
    return {
        "name": name, "stage": stage, "trained": len(trained),
        "moved": relative(moved, expected),
        "worst": max(relative({n: moved[n]}, {n: expected[n]}) for n in trained),
        "resumed": all(torch.equal(again[n], ours[n]) for n in ours),
        "average": relative(averaged, expected_average),
        "average_whole": set(read.state_dict) == set(ours)
        and all(torch.equal(read.state_dict[n], half[n]) for n in ours if n not in trained),
        "average_resumed": all(group.all_gather_object(same)),
        "average_scale": read.logit_scale / average["log_scale"].exp().item() - 1,
        "reports": [t["report"] for t in taken], "expected_reports": reports,
    }  # fmt: skip


def cases(group: Collectives) -> list[dict]:
    with TemporaryDirectory() as own:
        root = Path(group.broadcast_object(own))
        results = [case(root / f"{n}-{s[0]}", group, n, *s) for n, settings in CASES for s in settings]
        results.append({"refusal": refusal(build(group, "lion", 3, True, "image"), root / "adamw-3")})
        group.barrier()
    return results


if __name__ == "__main__":
    write_cases(cases, sys.argv[1])
