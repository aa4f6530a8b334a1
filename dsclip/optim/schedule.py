"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from dsclip.config.schema import OptimSection


def learning_rate(step: int, total_steps: int, optim: OptimSection) -> float:
    """Linear warm-up from lr/warmup_steps to lr, then what `optim.schedule` says.

    step counts from 0; total_steps is the length of the run, at whose end `cosine` and `wsd` reach min_lr. `cosine` and
    `constant` are OpenCLIP's; `inverse_sqrt` falls as 1/√step (Vaswani et al. 2017, eq. 3) and knows no end; `wsd` stays at
    lr, then falls linearly (Hägele et al. 2024).
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    fall = optim.lr - optim.min_lr
    match optim.schedule:
        case "constant":
            return optim.lr
        case "inverse_sqrt":
            return max(optim.min_lr, optim.lr * math.sqrt(max(1, optim.warmup_steps) / (step + 1)))
        case "wsd":
            return optim.min_lr + fall * min(1.0, max(0, total_steps - step) / (optim.wsd_share * total_steps))
        case "cosine":
            progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
            return optim.min_lr + fall * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
