"""How far estimates from few points may be off: quantiles of Fisher's F, and of Student's t, whose square is F with one number."""

from __future__ import annotations

from functools import cache
from math import pi, sqrt

import numpy as np

ANGLES = 20_001  # of the integral; quantiles agree with tables to six digits


@cache
def fisher(level: float, numbers: int, degrees: int) -> float:
    """f with P(F ≤ f) = level, for F of so many numbers and degrees of freedom, both 1 or more.

    With F = (degrees / numbers)·tan² a the density is that of sinᵏ⁻¹ a · cosᵛ⁻¹ a, integrated over the angle a (Simpson's rule)
    and inverted.
    """
    angle = np.linspace(0, pi / 2, ANGLES)
    density = np.sin(angle) ** (numbers - 1) * np.cos(angle) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum(density[:-2:2] + 4 * density[1:-1:2] + density[2::2])])
    at = float(np.interp(level, below / below[-1], angle[::2]))
    return float(degrees / numbers * np.tan(at) ** 2)


def student(level: float, degrees: int) -> float:
    """t with P(|T| ≤ t) = level."""
    return sqrt(fisher(level, 1, degrees))
