"""The command line of tools/soup.py."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsclip.checkpoint import Checkpoint
from dsclip.command_line import parser, run_tool, say
from dsclip.convert.dsclip_export import export_dsclip
from dsclip.data import build_eval_dataset
from dsclip.distributed import Collectives
from dsclip.errors import UserError
from dsclip.evaluate.opened import Wanted, open_model
from dsclip.evaluate.tasks.registry import run_task
from dsclip.weights.combine import check_shares, combine, opened
from dsclip.weights.soup import greedy

# What a task is judged by: the mean of these.
METRICS = {"zeroshot": ("top1",), "retrieval": ("image_to_text_recall@1", "text_to_image_recall@1")}


def main(argv: list[str] | None = None) -> None:
    """Parses, averages, measures, exits."""
    p = parser(
        "Averages the weights of models that were fine-tuned from the same start.",
        "python tools/soup.py A B C --out SOUP --greedy --task zeroshot --data demo:val",
    )
    p.add_argument("models", nargs="+", metavar="MODEL", help="two or more: anything that evaluate.py takes")
    p.add_argument("--out", required=True, type=Path, help="folder to write: a dsclip checkpoint")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--shares", type=float, nargs="+", help="one a model (default: equal)")
    how.add_argument(
        "--greedy", action="store_true",
        help="from the best downwards, only models that don't lower the score (needs --data)",
    )  # fmt: skip
    how.add_argument(
        "--interpolate", type=int, metavar="POINTS",
        help="so many averages along the line from the first of two models to the second; the best is kept (needs --data)",
    )  # fmt: skip
    p.add_argument("--task", choices=list(METRICS), default="zeroshot", help="what is measured (default: zeroshot)")
    p.add_argument("--data", help="held-out data to measure on, as of evaluate.py: each model's score and the soup's")
    p.add_argument("--max-samples", type=int, help="measure on the first samples only")
    sys.exit(run_tool(_run, p.parse_args(argv)))


@dataclass
class Kitchen:
    """Models to average, and how well an average does. scores: of all that was measured, by shares."""

    models: Sequence[Checkpoint]
    task: str
    data: str | None
    max_samples: int | None
    scores: dict[tuple[float, ...], float] = field(default_factory=dict)

    def score(self, shares: Sequence[float]) -> float:
        """Of the average with these shares, one for each of the models; measured once, on the folder that would be written."""
        key = tuple(shares)
        if key not in self.scores:
            with tempfile.TemporaryDirectory(prefix="dsclip-soup-") as folder:
                self.write(shares, Path(folder) / "soup")
                self.scores[key] = self._measured(Path(folder) / "soup")
            parts = (f"{s:.3g} × {m.path}" for s, m in zip(shares, self.models, strict=True) if s)
            say(f"{self.scores[key]:.2%}  {' + '.join(parts)}")
        return self.scores[key]

    def write(self, shares: Sequence[float], out: Path) -> None:
        """The average as a dsclip checkpoint."""
        chosen = [(model, share) for model, share in zip(self.models, shares, strict=True) if share]
        export_dsclip(combine(*zip(*chosen, strict=True)), out)

    def _measured(self, folder: Path) -> float:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = open_model(Wanted(str(folder)), device, Collectives.single(), folder.with_name("offload"))
        dataset = build_eval_dataset(self.data or "", image_size=model.image_size, max_samples=self.max_samples)
        metrics = run_task(self.task, model.embedder, dataset).metrics
        return sum(metrics[name] for name in METRICS[self.task]) / len(METRICS[self.task])

    def alone(self) -> list[float]:
        """Each model's own score."""
        return [self.score(self.among([i])) for i in range(len(self.models))]

    def among(self, chosen: Sequence[int]) -> list[float]:
        """The shares of an equal average of some of the models."""
        return [1 / len(chosen) if i in chosen else 0.0 for i in range(len(self.models))]


def _run(a: argparse.Namespace) -> tuple[dict[str, Any], str]:
    _check(a)
    with opened(a.models) as models:
        kitchen = Kitchen(models, a.task, a.data, a.max_samples)
        combine(models, kitchen.among(range(len(models))))  # says what can't be averaged, before anything is measured
        alone = [] if a.data is None else kitchen.alone()
        shares = _shares(a, kitchen, alone)
        score = None if a.data is None else kitchen.score(shares)
        kitchen.write(shares, a.out)
        used = [str(model.path) for model, share in zip(models, shares, strict=True) if share]
    result = {
        "out": str(a.out), "models": a.models, "shares": shares, "task": a.task, "data": a.data, "alone": alone, "score": score,
        "measured": [{"shares": list(key), "score": found} for key, found in kitchen.scores.items()],
    }  # fmt: skip
    text = f"{a.out}: {len(used)} of {len(models)} models, shares {', '.join(f'{s:.3g}' for s in shares)}"
    if score is not None:
        text += f"\n{a.task} on {a.data}: {score:.2%}; the best single model {max(alone):.2%}"
    return (
        result,
        f"{text}\n\nNext:\n  python launchers/evaluate.py --model {a.out} --task {a.task} --data {a.data or 'SHARDS'}",
    )


def _check(a: argparse.Namespace) -> None:
    if len(a.models) < 2:
        raise UserError("one model is no soup; give two or more")
    if a.out.exists():
        raise UserError(f"{a.out} exists already; choose another folder or remove it")
    if (a.greedy or a.interpolate is not None) and a.data is None:
        raise UserError(f"{'--greedy' if a.greedy else '--interpolate'} needs --data: it chooses by a score")
    if a.interpolate is not None and (a.interpolate < 2 or len(a.models) != 2):
        raise UserError("--interpolate needs two models, and at least 2 points, which are the models themselves")
    if a.shares is not None:
        check_shares(a.shares, len(a.models), "models")
        if abs(sum(a.shares) - 1) > 1e-6:
            raise UserError(f"--shares add up to {sum(a.shares):g}; those of an average add up to 1")
    if a.data is None and a.max_samples is not None:
        raise UserError("--max-samples belongs to --data, which isn't given; leave it out")


def _shares(a: argparse.Namespace, kitchen: Kitchen, alone: Sequence[float]) -> list[float]:
    if a.greedy:
        chosen, _ = greedy(alone, lambda some: kitchen.score(kitchen.among(some)))
        return kitchen.among(chosen)
    if a.interpolate is not None:
        steps = [k / (a.interpolate - 1) for k in range(a.interpolate)]
        return max(([1 - s, s] for s in steps), key=kitchen.score)
    return a.shares or kitchen.among(range(len(kitchen.models)))
