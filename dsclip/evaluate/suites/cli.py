"""`launchers/evaluate.py --suite`, and where features are cached."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dsclip.command_line import say
from dsclip.data.sources.cache import dsclip_cache
from dsclip.datasets.inspect_cli import storage_of
from dsclip.distributed import Collectives
from dsclip.errors import UserError
from dsclip.evaluate.arguments import FLAGS, NEGATIVE_KEY
from dsclip.evaluate.feature_cache import FeatureCache
from dsclip.evaluate.opened import OpenedModel
from dsclip.evaluate.suites.report import averages, suite_markdown
from dsclip.evaluate.suites.run import Place, run_suite
from dsclip.evaluate.suites.suite import file_name, load_suite, present_entries
from dsclip.files import sha256, write_whole

NONE = "none"
# What a suite's entries say; keys have defaults.
OF_ONE_TASK = ("task", "data", "split", "images", "group_key", "max_samples", "corruption", *FLAGS)
KEYS = {"caption_key": "caption", "negative_key": NEGATIVE_KEY}


def check_choice(a: argparse.Namespace) -> None:
    """Raises UserError unless it is one task on one set, or a suite."""
    if a.suite is None:
        if a.task is None or a.data is None:
            raise UserError("say what to evaluate on: --task and --data, or --suite")
        if a.data_root is not None:
            raise UserError("--data-root says where the sets of a --suite are; for one task give --data")
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


def evaluate_suite(a: argparse.Namespace, model: OpenedModel, group: Collectives) -> dict[str, Any]:
    """What `run_suite` returns, with averages; on rank 0 also written to `results.json` and `results.md` in the suite's folder."""
    suite = load_suite(a.suite)
    folder = a.output or Path("runs") / "evaluations" / suite.name / file_name(Path(a.model).name or a.model)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; a suite's results go into a folder")
    place = Place(a.data_root or Path(), folder, storage_of(a))
    result = run_suite(suite, model, feature_cache(a, model, group, in_suite=True), group, place)
    if group.rank == 0:
        result |= {"averages": averages(result), "folder": str(folder)}
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "results.json", json.dumps(result, indent=2) + "\n")
        write_whole(folder / "results.md", suite_markdown(result) + "\n")
        say(f"results in {folder}")
    return result


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
