"""`launchers/evaluate.py --suite`: its options, and where features are cached."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsclip.command_line import say
from dsclip.data.sources.cache import dsclip_cache
from dsclip.datasets.inspect_cli import storage_of
from dsclip.distributed import Collectives
from dsclip.errors import UserError
from dsclip.evaluate.adapter import ADAPTER
from dsclip.evaluate.arguments import FLAGS, NEGATIVE_KEY
from dsclip.evaluate.feature_cache import FeatureCache
from dsclip.evaluate.opened import OpenedModel
from dsclip.evaluate.suites.report import averages, suite_markdown
from dsclip.evaluate.suites.run import Place, run_suite
from dsclip.evaluate.suites.suite import file_name, load_suite, present_entries, suite_names
from dsclip.evaluate.suites.trainings import Trainings
from dsclip.files import sha256, write_whole

NONE = "none"
# What a suite's entries say; keys have defaults.
OF_ONE_TASK = ("task", "data", "split", "images", "group_key", "max_samples", "corruption", *FLAGS)
KEYS = {"caption_key": "caption", "negative_key": NEGATIVE_KEY}


def add_suite_options(p: argparse.ArgumentParser) -> None:
    """`--suite` and what is said to it; each is None where it isn't given."""
    p.add_argument("--suite", help=f"many tasks in one go: {', '.join(suite_names())}, or a YAML file")
    p.add_argument("--data-root", type=Path, help="with --suite: where its sets are (default: this folder)")
    p.add_argument(
        "--launch",
        help="with --suite: what starts launchers/train.py for entries that fine-tune the model, such as 'deepspeed --num_gpus 8' "
        "(default: one process)",
    )
    p.add_argument("--ds_config", "--ds-config", help="with --suite: of these trainings (default: zero1_bf16)")


def check_choice(a: argparse.Namespace) -> None:
    """Raises UserError unless it is one task on one set, or a suite."""
    if a.suite is None:
        if a.task is None or a.data is None:
            raise UserError("say what to evaluate on: --task and --data, or --suite")
        if a.data_root is not None:
            raise UserError("--data-root says where the sets of a --suite are; for one task give --data")
        if a.launch is not None or a.ds_config is not None:
            raise UserError(
                "--launch and --ds_config are of trainings that entries of a --suite ask for; one task has none"
            )
    else:
        _check_suite(a)
    if a.max_samples is not None and a.max_samples < 1:
        raise UserError(f"--max-samples is {a.max_samples}; it must be 1 or more")
    if not 0 <= a.feature_cache_gb < math.inf:
        raise UserError(f"--feature-cache-gb is {a.feature_cache_gb}; it must be a number of gigabytes")


def _check_suite(a: argparse.Namespace) -> None:
    """Before the model is loaded, which may take minutes."""
    given = [name for name in OF_ONE_TASK if getattr(a, name) is not None]
    given += [name for name, default in KEYS.items() if getattr(a, name) != default]
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')} can't be given with --suite: its entries say that, in a file of your own"
        )
    present_entries(load_suite(a.suite), a.data_root or Path())


def evaluate_suite(
    a: argparse.Namespace, model: OpenedModel, group: Collectives, open_other: Callable[[Path], OpenedModel]
) -> dict[str, Any]:
    """What `run_suite` returns, with averages; on rank 0 also written to `results.json` and `results.md` in the suite's folder.

    open_other: opens the run that an entry's fine-tuning left.
    """
    suite = load_suite(a.suite)
    folder = a.output or Path("runs") / "evaluations" / suite.name / file_name(Path(a.model).name or a.model)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; a suite's results go into a folder")
    place = Place(a.data_root or Path(), folder, storage_of(a))
    present = suite.find(place.data_root)
    tuned = [(e, e.fine_tune) for e in suite.entries if e.fine_tune is not None and e.name in present]
    names = {entry.name for entry, _ in tuned}
    as_it_is = replace(suite, entries=tuple(e for e in suite.entries if e.name not in names))
    result = run_suite(as_it_is, model, feature_cache(a, model, group, in_suite=True), group, place)
    rows = {row["name"]: row for row in result["entries"]}
    trainings = _trainings(a, model, group, open_other)
    for entry, fine_tune in tuned:
        rows[entry.name] = trainings.measured(entry, fine_tune, suite, group, place)
    result["entries"] = [rows[entry.name] for entry in suite.entries]
    if group.rank == 0:
        result |= {"averages": averages(result), "folder": str(folder)}
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "results.json", json.dumps(result, indent=2) + "\n")
        write_whole(folder / "results.md", suite_markdown(result) + "\n")
        say(f"results in {folder}")
    return result


def _trainings(
    a: argparse.Namespace, model: OpenedModel, group: Collectives, open_other: Callable[[Path], OpenedModel]
) -> Trainings:
    def open_run(run: Path) -> tuple[OpenedModel, FeatureCache]:
        opened = open_other(run)
        return opened, feature_cache(a, opened, group, in_suite=True)

    impossible = None
    if a.model.startswith(ADAPTER):
        impossible = "an adapter's model can't be trained here"
    elif a.ema:
        impossible = "a fine-tuning begins with the weights, not with their moving average: leave out --ema"
    return Trainings(
        a.model, a.tokenizer, model.protocol()["model"]["weights_sha256"] if group.rank == 0 else None,
        shlex.split(a.launch) if a.launch else [sys.executable], a.ds_config or "zero1_bf16", impossible, open_run,
    )  # fmt: skip


def feature_cache(a: argparse.Namespace, model: OpenedModel, group: Collectives, *, in_suite: bool) -> FeatureCache:
    """In the folder that is asked for; a suite has one unless it is told otherwise, a single task has none."""
    folder = None if a.feature_cache in (None, NONE) else Path(a.feature_cache)
    if in_suite and a.feature_cache is None:
        folder = dsclip_cache() / "features"
    described: dict[str, Any] = {}
    if group.rank == 0:
        run = model.protocol()
        described = {
            "model": run["model"] | {"path": ""},
            "precision": run["precision"],
            "image": run["image"],
            "text": run["text"],
        }
        if run["model"]["weights_sha256"] is None and folder is not None:
            say("features are kept in memory alone: the weights of an adapter's model are not known")
            folder = None
    key = sha256(json.dumps(described, sort_keys=True).encode())
    return FeatureCache(key, group, folder, int(a.feature_cache_gb * 1e9))
