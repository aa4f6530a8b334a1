"""The training loop: next batch, step, log, save, evaluate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsclip.config import Recipe
from dsclip.data.batch import Batch
from dsclip.errors import RunStopped
from dsclip.train.evaluation import Evaluation
from dsclip.train.guard import Guard
from dsclip.train.guarded_evaluation import evaluate
from dsclip.train.prefetch import on_device
from dsclip.train.records import EvaluationError, Results
from dsclip.train.saving import Saving
from dsclip.train.stop import StopSignals
from dsclip.train.teacher import Teacher
from dsclip.train.watch import Watch

if TYPE_CHECKING:  # importing it takes DeepSpeed's seconds
    from dsclip.engine.contrastive import ContrastiveEngine
    from dsclip.engine.step_metrics import StepMetrics


@dataclass(frozen=True)
class Outcome:
    """Where a run ended. loss: None when nothing was left to train; evaluation_errors: of those that gave no results."""

    step: int
    loss: float | None
    evaluation: Results
    evaluation_errors: list[EvaluationError]
    checkpoint: Path


def train(
    recipe: Recipe,
    engine: ContrastiveEngine,
    batches: Iterator[Batch],
    evaluation: Evaluation,
    saving: Saving,
    watch: Watch,
    guard: Guard,
    data_state: dict[str, Any] | None = None,
    teacher: Teacher | None = None,
) -> Outcome:
    """Steps until `train.steps`; every rank runs this in step with the others. Raises RunStopped after a signal, saved.

    batches: as they come, those that the run leaves out among them no more; guard: raises RollBack where the run goes back.
    data_state: the position in the data of the checkpoint that the run continues. teacher: beside the student, if there is one.
    """
    settings = recipe.train
    results: Results = {}
    errors: list[EvaluationError] = []
    metrics: StepMetrics | None = None
    batches = on_device(batches, engine.device)
    if teacher is not None:
        batches = teacher.teach(batches)
    checkpoint: Path | None = None
    heart = watch.heart
    first_step = engine.step

    def measure() -> Results:
        heart.beat("evaluating", longer=True)
        measured, error = evaluate(evaluation, engine, watch)
        if error is not None:
            errors.append({"step": engine.step, "error": error})
        return measured

    with StopSignals(engine.group, heart) as signals:
        while engine.step < settings.steps:
            started, first = time.monotonic(), engine.step == first_step
            heart.beat("waiting for its data", engine.step + 1, longer=first)
            batch = next(batches)
            waited = time.monotonic() - started
            heart.beat("computing, or waiting for other ranks", longer=first)
            metrics = engine.train_step(batch, measure=watch.logs(engine.step + 1))
            data_state = batch.state
            watch.step(metrics, batch, waited, time.monotonic() - started, engine.forward_s)
            guard.step(metrics, batch)

            last, stop = engine.step == settings.steps, signals.agreed()
            ends = last or stop is not None or watch.fails()
            due = saving.due(engine.step)
            # A step is judged before it is saved; who was asked to stop has no time to go back.
            if stop is None and (ends or due):
                guard.judge()
            # Saved before it is evaluated: an evaluation that fails must not cost the run.
            if ends:
                checkpoint = saving.save(data_state, guard.state())
            elif due:
                saving.save_on_the_way(data_state, guard.state())
            else:
                saving.look()
            if watch.fails():
                watch.check_applied()
            if stop:
                raise RunStopped(
                    f"stopped by {stop} after step {engine.step} of {settings.steps}, which is saved in {checkpoint}. "
                    "Go on with the same command and --resume auto"
                )
            if evaluation.due(engine.step, last):
                results = measure()
    if checkpoint is None:  # resumed at the end: nothing left to train
        checkpoint = saving.found(engine.step) or saving.save(data_state, guard.state())
        results = measure()
    loss = None if metrics is None else metrics.loss
    return Outcome(engine.step, loss, results, errors, checkpoint)
