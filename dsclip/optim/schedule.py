"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from dsclip.config.schema import OptimSection


def learning_rate(step: int, total_steps: int, optim: OptimSection) -> float:
    """Linear warm-up from lr/warmup_steps to lr, then cosine to min_lr or constant (OpenCLIP's schedule).

    step counts from 0; total_steps is the length of the run.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
