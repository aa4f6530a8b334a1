"""A recipe for shards that were just made: sizes that fit them, and measured on what was held out."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RECIPE = "recipe.yaml"
TRAIN_SPLITS = ("train", "")  # "": all in one folder
HELD_OUT_SPLITS = ("val", "valid", "validation", "test")
TINY_SIDE = 64  # pixels: smaller pictures, such as CIFAR's, are not enlarged
LARGE_SET, LARGER_SET = 100_000, 3_000_000  # pairs from which a published model is worth training; our guess
EPOCHS, LEAST_STEPS = 30, 300

SMALL_MODEL = {
    "preset": "demo", "image_size": 96, "patch_size": 16, "vision_width": 192, "vision_heads": 3, "vision_mlp_width": 768,
    "text_width": 192, "text_heads": 3, "text_mlp_width": 768, "embed_dim": 192,
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """What a recipe depends on. samples: {split: images}; side: the median of the images' shorter sides; tokens: most
    captions have no more, begin and end token included."""

    out: Path
    samples: dict[str, int]
    classes: bool
    side: int
    tokens: int
    tokenizer: str


def write_recipe(made: Made) -> Path | None:
    """Writes OUT/recipe.yaml and returns its path; None where nothing was made to train on."""
    train = next((s for s in TRAIN_SPLITS if made.samples.get(s)), None)
    if train is None:
        return None
    held_out = next((s for s in HELD_OUT_SPLITS if made.samples.get(s)), None)
    path = made.out / RECIPE
    content = yaml.safe_dump(_recipe(made, train, held_out), sort_keys=False, allow_unicode=True)
    path.write_text(_head(made, train, held_out) + content, encoding="utf-8")
    return path


def folder_of(out: Path, split: str) -> Path:
    """Where a split lies."""
    return out / split if split else out


def _recipe(made: Made, train: str, held_out: str | None) -> dict[str, Any]:
    count = made.samples[train]
    batch = largest_batch(count)
    steps = max(LEAST_STEPS, EPOCHS * count // batch)
    small = count < LARGE_SET
    recipe = {
        "model": _model(made, count),
        "data": {
            "train_shards": str(folder_of(made.out, train)),
            "tokenizer": made.tokenizer,
            "workers": 0 if small else 2,
        },
        "batch": {"global_batch_size": batch},
        "loss": {"duplicates": "mask"},
        "optim": {"lr": 1e-3 if small else 5e-4, "warmup_steps": min(2000, steps // 10), "weight_decay": 0.1},
        "train": {"name": _run_name(made.out), "steps": steps},
    }
    if not made.classes:
        recipe["data"]["group_key"] = "image_id"
    if held_out is not None:
        task = "zeroshot_shards" if made.classes else "retrieval_shards"
        recipe["eval"] = {"every_steps": max(1, steps // 4), task: str(folder_of(made.out, held_out))}
    return recipe


def _run_name(out: Path) -> str:
    return re.sub(r"[^\w.+-]+", "-", out.resolve().name).lstrip("-.+") or "run"


def largest_batch(count: int) -> int:
    """The largest power of two that neither has a sample twice nor is more than sets of this size are trained with."""
    most = 256 if count < LARGE_SET else 1024 if count < LARGER_SET else 4096
    batch = 2  # a single pair has nothing to be told apart from, and two ranks need two samples
    while 2 * batch <= min(count, most):
        batch *= 2
    return batch


def _model(made: Made, count: int) -> dict[str, Any]:
    if count >= LARGE_SET:
        return {"preset": "ViT-S-32" if count < LARGER_SET else "ViT-B-32"}
    size = {"image_size": 32, "patch_size": 4} if made.side < TINY_SIDE else {}
    return SMALL_MODEL | size | {"context_length": min(77, max(16, -(-made.tokens // 8) * 8))}


def _head(made: Made, train: str, held_out: str | None) -> str:
    counts = f"{made.samples[train]} training images"
    counts += f", {made.samples[held_out]} held-out ones in {held_out}/" if held_out else ", and none held out"
    lines = [
        f"Written by tools/make_shards.py: {counts}. Any key can be changed here or on the command line.",
        f"Samples with the same {'caption' if made.classes else 'image'} are no negatives of each other (loss.duplicates).",
    ]
    if made.samples[train] < LARGE_SET:
        lines.append("The model is one for two CPU cores; for more set model.preset to ViT-S-32, ViT-B-32 or larger.")
    if held_out is None:
        lines.append(
            "Nothing is evaluated: make the shards with --holdout 0.1 to measure on pairs that training doesn't see."
        )
    return "".join(f"# {line}\n" for line in lines)


def train_command(recipe: Path) -> str:
    """What starts a run with this recipe on this machine, from the repository's root."""
    import torch

    launcher = "deepspeed" if torch.cuda.is_available() else "OMP_NUM_THREADS=1 deepspeed --num_gpus 2"
    return f"{launcher} launchers/train.py --config {shlex.quote(str(recipe))}"
