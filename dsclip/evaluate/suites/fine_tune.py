"""What an entry may say under `fine_tune`: a training of the model that comes before its measurement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsclip.config import load_recipe
from dsclip.errors import UserError, did_you_mean

KEYS = ("config", "train", "set")
# Keys of the recipe that the suite sets: another model would be measured under this one's name, or the run not be found again.
OF_THE_SUITE = ("model.init", "model.preset", "data.tokenizer", "data.train_shards", "train.output", "train.name")


@dataclass(frozen=True)
class FineTune:
    """config: a recipe's name or file. train: the training shards, below --data-root. overrides: keys of the recipe, `optim.lr=1e-4`."""

    config: str
    train: str
    overrides: tuple[str, ...] = ()


def read_fine_tune(value: Any, where: str, folder: Path) -> FineTune | None:
    """What an entry says under `fine_tune`; a recipe's file may be named relative to the suite's folder. Raises UserError."""
    if value is None:
        return None
    said = f"{where}: `fine_tune`"
    if not isinstance(value, dict):
        raise UserError(f"{said} is {value!r}; it must be {{config: RECIPE, train: SHARDS, set: [KEY=VALUE, …]}}")
    for key in value:
        if key not in KEYS:
            raise UserError(f"{said} has no key `{key}`.{did_you_mean(str(key), list(KEYS))}")
    for key in ("config", "train"):
        if not isinstance(value.get(key), str):
            raise UserError(f"{said} needs `{key}`, a text")
    overrides = value.get("set", [])
    if not isinstance(overrides, list) or not all(isinstance(text, str) and "=" in text for text in overrides):
        raise UserError(f"{said}: `set` is {overrides!r}; it must be a list of KEY=VALUE")
    for key in (text.partition("=")[0].strip() for text in overrides):
        if key in OF_THE_SUITE:
            raise UserError(f"{said}: `set` says {key}, which the suite sets itself; leave it out")
    config = folder / value["config"]
    found = FineTune(str(config.resolve()) if config.is_file() else value["config"], value["train"], tuple(overrides))
    try:
        load_recipe(
            found.config, [*overrides, "model.init=MODEL", "model.preset=auto", f"data.train_shards={found.train}"]
        )
    except UserError as error:
        raise UserError(f"{said}: {error}") from error
    return found
