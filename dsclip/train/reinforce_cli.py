"""The command line of `tools/reinforce_shards.py`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from dsclip.command_line import parser, run_tool
from dsclip.config import load_recipe
from dsclip.config.objective_section import STORED
from dsclip.convert.init import starting_config
from dsclip.data.shards.shard_set import open_shards
from dsclip.data.sources.storage import Storage
from dsclip.datasets.rewrite import labels_of, write_again
from dsclip.errors import UserError
from dsclip.train.class_prompts import with_class_prompts
from dsclip.train.reinforce import Reinforcement
from dsclip.train.teacher import drawn_by, open_teacher

EXAMPLE = "python tools/reinforce_shards.py runs/big data/reinforced --config recipe.yaml --passes 10"


def main(argv: list[str] | None = None) -> None:
    """Parses, writes the shards, says what to train with, exits."""
    p = parser("Writes a recipe's training shards again, with a teacher's features in every sample.", EXAMPLE)
    p.add_argument("teacher", metavar="TEACHER", help="a model, as model.init takes it")
    p.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    p.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="changes of the recipe, as in launchers/train.py"
    )
    p.add_argument(
        "--config",
        default="demo",
        metavar="RECIPE",
        help="of the student: its shards, crops, captions and seed count (default: demo)",
    )
    p.add_argument(
        "--passes", type=int, default=10, help="over the data, each with crops and captions of its own (default: 10)"
    )
    p.add_argument(
        "--batch-size", type=int, default=256, help="pictures that the teacher looks at together (default: 256)"
    )
    sys.exit(run_tool(_reinforce, p.parse_intermixed_args(argv)))


def _reinforce(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if min(arguments.passes, arguments.batch_size) < 1:
        raise UserError("--passes and --batch-size must be at least 1")
    recipe = load_recipe(arguments.config, arguments.overrides)
    storage = Storage(tuple(recipe.data.trusted_hosts), recipe.data.retries)
    recipe_data = with_class_prompts(recipe.data, storage)
    if recipe_data.weights is not None:
        raise UserError("`data.weights` mixes several sets, and stored features need one; leave `data.weights` out")
    config = starting_config(recipe.model.init, recipe.model.preset, **recipe.model.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = open_teacher(arguments.teacher, given_as="TEACHER").load(device, None)
    shards = open_shards(recipe_data.train_shards, storage)
    if shards.twice:
        raise UserError(
            f"several of the shards are called {shards.twice}, and a name tells which crops the features are of. Rename shards until no two "
            "are called the same, run tools/index_shards.py on their folders, and write them together"
        )
    at_once = max(1, arguments.batch_size // arguments.passes)
    reinforcement = Reinforcement(teacher, arguments.passes, config.image_size, at_once)
    reinforcement.check(recipe_data, recipe.train.seed, shards, storage)
    labels = labels_of(shards, storage)
    labels["teacher"] = {
        "model": arguments.teacher, "scale": teacher.scale, "width": teacher.model.config.embed_dim, "passes": arguments.passes,
        "drawn_by": drawn_by(recipe_data, recipe.train.seed, config.image_size),
    }  # fmt: skip
    written = write_again(
        shards, reinforcement.samples(recipe_data, recipe.train.seed, shards, storage), arguments.out, labels
    )
    keys = f"data.train_shards={arguments.out} objective.teacher={STORED}"
    lost = reinforcement.unusable.total()
    without = f", {lost} of them without, since training can't use them" * bool(lost)
    text = f"{written} samples in {arguments.out} with features of {arguments.passes} passes{without}\n\nTrain with: {keys}"
    result = {
        "out": str(arguments.out),
        "samples": written,
        "without": lost,
        "passes": arguments.passes,
    }
    return result, text
