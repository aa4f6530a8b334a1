"""Bytes of the optimizer: what it keeps, and what its step takes for a moment."""

from __future__ import annotations

from dsclip.config.schema import OptimSection

MASTER = MOMENT = 4
# Bytes of state a parameter, beside its master; of Muon those of what is no matrix of a block.
STATE = {"adamw": 8, "adamw_bf16": 4, "stable_adamw": 8, "lion": 4, "lamb": 8, "muon": 8}
# float32 vectors as long as a rank's part that a step makes. torch's AdamW is one kernel.
VECTORS = {"adamw": 0, "adamw_bf16": 0, "stable_adamw": 4, "lion": 1, "lamb": 3, "muon": 5}


def kept_bytes(parameters: int, matrices: int, optim: OptimSection) -> tuple[float, float]:
    """(masters and moments, the moving average of the weights) of all ranks together.

    parameters: numbers that are trained; matrices: of these, those in matrices of blocks.
    """
    kept = (MASTER + STATE[optim.name]) * parameters
    if optim.name == "muon":
        kept -= MOMENT * matrices
    return kept, 0 if optim.ema is None else MASTER * parameters


def step_bytes(parameters: float, optim: OptimSection) -> float:
    """What a step needs on a rank with so many numbers, after backward, when all activations are freed."""
    return MASTER * VECTORS[optim.name] * parameters
