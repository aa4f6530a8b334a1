"""Run on every rank: a few steps of each case from the checkpoint that other ranks wrote in another ZeRO stage."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dsclip.checkpoint import CheckpointStore, find_checkpoint, load_checkpoint
from dsclip.config.objective_section import HeadSection, ObjectiveSection, TermSection
from dsclip.config.schema import BatchSection, LossSection, ModelSection, OptimSection, Recipe, TrainSection
from dsclip.distributed import Collectives
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.whole_tensors import whole_weights
from tests.distributed.checkpoint_worker import QUEUE, NoTokenizer
from tests.distributed.exactness_worker import CONFIG, GLOBAL_BATCH, SEED, ds_config, global_batch, local_part
from tests.distributed.launch import write_cases

ADAMW = OptimSection(lr=1e-3, warmup_steps=0, schedule="constant", weight_decay=0.1, eps=1e-6, layer_decay=0.7)
MUON = replace(ADAMW, name="muon", ema=0.6, rules=[{"match": "mlp", "lr_scale": 0.5}])
ROUTED = replace(CONFIG, text_experts=3, text_experts_every=1)  # whose balance no optimizer holds
HEADS = ObjectiveSection(
    terms=[TermSection("contrast", ["image.pixels", "text.words"])],
    heads=[HeadSection("pixels", "projector", "image", 8), HeadSection("words", "projector", "text", 8, 20)],
)
# name: bf16, locked tower, optimizer, loss, objective
CASES = {
    "adamw-fp32": (False, "image", ADAMW, LossSection(), ObjectiveSection()),
    "muon-fp32": (False, "none", MUON, LossSection(), HEADS),
    "adamw_bf16": (True, "text", replace(ADAMW, name="adamw_bf16"), LossSection(), HEADS),
    "adamw-bf16": (True, "none", ADAMW, QUEUE, ObjectiveSection()),
}


def build(
    group: Collectives, stage: int, bf16: bool, lock: str, optim: OptimSection, loss: LossSection, objective: ObjectiveSection
):  # fmt: skip
    recipe = Recipe(
        model=ModelSection(lock=lock, unlocked_layers=1 if lock != "none" else 0), batch=BatchSection(GLOBAL_BATCH),
        optim=optim, loss=loss, objective=objective, train=TrainSection(seed=SEED, steps=12, compile="off"),
    )  # fmt: skip
    return ContrastiveEngine(recipe, ds_config(stage, bf16, group.world_size), ROUTED)


def averages(engine: ContrastiveEngine, group: Collectives) -> dict[str, torch.Tensor]:
    """Whole, flat, of the weights' moving average, where there is one."""
    parts = group.all_gather_object({} if engine._average is None else engine._average.pieces())
    return {n: torch.cat([part[n] for part in parts if n in part]) for n in {n for part in parts for n in part}}


def case(group: Collectives, name: str, folder: Path, stage: int, stop: int) -> dict:
    """Continues to step `stop`; says what was found of the state that the launch before left beside its checkpoint."""
    engine, left = build(group, stage, *CASES[name]), folder / "whole.pt"
    found = {}
    if left.exists():
        load_checkpoint(engine, find_checkpoint(folder), world_size=group.world_size)
        before, now = torch.load(left), {"weights": whole_weights(engine), "average": averages(engine, group)}
        for kind, tensors in now.items():
            found[kind] = tensors.keys() == before[kind].keys() and all(
                torch.equal(x, before[kind][n]) for n, x in tensors.items()
            )
    losses = [engine.train_step(local_part(global_batch(s), group)).loss for s in range(engine.step, stop)]
    CheckpointStore(folder, keep=1, tokenizer=NoTokenizer()).save(engine, {}, asdict(engine.recipe))
    whole = {"weights": whole_weights(engine), "average": averages(engine, group)}
    if group.rank == 0:
        torch.save(whole, left)
    group.barrier()
    engine.close()
    return {"name": name, "found": found, "losses": losses}


if __name__ == "__main__":
    out, root, options = sys.argv[1:]
    settings = json.loads(options)
    write_cases(lambda group: [case(group, n, Path(root) / n, **settings) for n in CASES], out)
