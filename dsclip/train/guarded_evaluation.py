"""An evaluation that fails is reported, and the run goes on, as long as the ranks are still in step."""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING

from dsclip.errors import UserError
from dsclip.train.evaluation import Evaluation
from dsclip.train.records import Results
from dsclip.train.watch import Watch

if TYPE_CHECKING:  # importing it takes DeepSpeed's seconds
    from dsclip.engine.contrastive import ContrastiveEngine

# A rank that failed alone waits so long for the others, which then hang in a collective without it.
WAIT_S = 300.0


def evaluate(evaluation: Evaluation, engine: ContrastiveEngine, watch: Watch) -> tuple[Results, str | None]:
    """(results, what went wrong) of an evaluation, the same on every rank. Collective.

    Raises what a rank raised when the others did not come out of their evaluation too: they are out of step for good.
    """
    results: Results = {}
    failure: Exception | None = None
    try:
        results = evaluation.run(engine, watch)
    except Exception as error:
        failure = error
        if not isinstance(error, UserError):
            print(f"dsclip: rank {engine.group.rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    said = engine.group.meet("" if failure is None else _words(failure), WAIT_S)
    if said is None:
        raise failure or RuntimeError(f"other ranks did not come out of the evaluation within {WAIT_S:.0f} s")
    if not any(said):
        return results, None
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(said):
        if text:
            by_text.setdefault(text, []).append(rank)
    problem = "; ".join(f"{text} (ranks {', '.join(map(str, ranks))})" for text, ranks in by_text.items())
    if len(by_text) == 1 and len(by_text[next(iter(by_text))]) == len(said):
        problem = next(iter(by_text))
    text = f"step {engine.step}: the evaluation failed, and the run goes on: {problem}"
    watch.event(engine.step, text, evaluation_error=problem)
    return {}, problem


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
