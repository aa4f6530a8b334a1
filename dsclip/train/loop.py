"""The training loop: next batch, step, log, evaluate, save."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from dsclip.config import Recipe
from dsclip.train.prefetch import on_device


@dataclass(frozen=True)
class Outcome:
    """Where a run ended. evaluation: {task: {metric: value}}."""

    step: int
    loss: float | None
    evaluation: dict
    checkpoint: Path


def train(recipe: Recipe, engine, loader, evaluation, store, watch) -> Outcome:
    """Steps until `train.steps`; every rank runs this in step with the others."""
    settings, results, loss = recipe.train, {}, None
    checkpoint = None
    batches = on_device(iter(loader), engine.device)
    while engine.step < settings.steps:
        started = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - started
        metrics = engine.train_step(batch)
        loss = metrics.loss
        watch.step(metrics, batch, waited, time.monotonic() - started)

        last = engine.step == settings.steps
        if evaluation.due(engine.step, last):
            results = evaluation.run(engine, watch)
        if last or _due(engine.step, settings.save_every):
            checkpoint = store.save(engine, batch["state"], asdict(recipe))
            watch.message(f"step {engine.step}: saved {checkpoint}")
    if checkpoint is None:  # resumed at the end: nothing left to train
        results = evaluation.run(engine, watch)
        checkpoint = store.save(engine, next(batches)["state"], asdict(recipe))
    return Outcome(engine.step, loss, results, checkpoint)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
