"""Run on every rank: starts engines of each ZeRO stage from weights that rank 0 alone can read; writes one JSON file."""

import json
import sys
from pathlib import Path

import torch

from dsclip.config.schema import BatchSection, Recipe, TrainSection
from dsclip.convert.init import load_init_once
from dsclip.distributed import Collectives, shutdown_distributed
from dsclip.engine.build import init_distributed
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.whole_tensors import whole_weights
from dsclip.errors import UserError
from tests.distributed.exactness_worker import CONFIG, GLOBAL_BATCH, OPTIM, ds_config
from tests.test_convert import SCALE, openclip_weights, perturbed


def openclip_file(folder: Path) -> tuple[Path, dict]:
    """An OpenCLIP state dict, and the weights in it by dsclip's names."""
    model = perturbed(CONFIG)
    path = folder / "weights.pt"
    torch.save({name: x.detach() for name, x in openclip_weights(model).items()}, path)
    return path, {name: x.detach() for name, x in model.named_parameters()}


def sentence(path: Path, group: Collectives) -> str:
    try:
        load_init_once(path, CONFIG, group)
    except UserError as error:
        return str(error)
    return "accepted"


def started(stage: int, weights: dict | None, scale: float, expected: dict | None, group: Collectives) -> bool:
    """Whether this rank's engine has exactly the expected weights and scale."""
    recipe = Recipe(batch=BatchSection(GLOBAL_BATCH), optim=OPTIM, train=TrainSection(seed=3, steps=10, compile="off"))
    settings = ds_config(stage, False, group.world_size)
    engine = ContrastiveEngine(recipe, settings, CONFIG, state_dict=weights, init_scale=scale)
    ours = whole_weights(engine)
    expected = group.broadcast_object(expected)
    same = all(torch.equal(ours[n], expected[n]) for n in expected) and abs(engine.scalars.scale / SCALE - 1) < 1e-6
    engine.close()
    return same


def main(out: str, folder: str) -> None:
    init_distributed()
    group, folder = Collectives.current(), Path(folder)
    path, expected = openclip_file(folder) if group.rank == 0 else (folder / "not for this rank", None)
    initial = load_init_once(path, CONFIG, group)
    weights, scale = initial.weights, initial.scale
    found = {"read": weights is not None, "stages": [started(s, weights, scale, expected, group) for s in (1, 2, 3)]}
    found["missing"] = sentence(folder / "nowhere.pt", group)
    if group.rank == 0:
        (folder / "cut.safetensors").write_bytes(b"\xff" * 64)
    found["damaged"] = sentence(folder / "cut.safetensors", group)
    everyone = group.all_gather_object(found)
    if group.rank == 0:
        Path(out).write_text(json.dumps(everyone))
    shutdown_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
