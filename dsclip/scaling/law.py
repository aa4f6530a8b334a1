"""Laws E(C) between error and compute, and their least squares in log E.

power       E = β·C^α                      Cherti et al. 2023
saturating  E = E∞ + β·C^α                 with an irreducible error
double      E = E∞ + β·(C + C₀)^α          saturating at both ends: Zhai et al. 2022, Nezhurina et al. 2025

Everything is batched: [b, n] are b sets of n points, such as draws or resamples, each with a law of its own. In natural
logarithms about an origin o, x = ln C − o, the parameters are θ = (ln β + α·o, α, E∞, ln C₀ − o), as many as the form has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Model = Callable[[Array], tuple[Array, Array]]
Form = Literal["power", "saturating", "double"]
PARAMETERS: dict[Form, int] = {"power": 2, "saturating": 3, "double": 4}

STEPS = 80  # of Levenberg and Marquardt; draws of twelve points settle within thirty
STARTS = (0.0, 0.5, 0.9)  # the irreducible error, as a share of the smallest error
LARGEST = 700.0  # exponent of e that is still a number, and whose inverse is
ALPHA = (-10.0, -1e-3)  # of saturating laws: an error that doesn't fall has no irreducible part


@dataclass(frozen=True)
class Law:
    """A law with its numbers. compute in GMACs."""

    form: Form
    alpha: float
    beta: float
    irreducible: float = 0.0
    offset: float = 0.0

    def error(self, compute: Array | float) -> Array:
        """E at each compute."""
        shifted = np.log(np.asarray(compute, dtype=np.float64) + self.offset)
        return np.asarray(self.irreducible + bounded_exp(np.log(self.beta) + self.alpha * shifted))


def bounded_exp(x: Array) -> Array:
    """e^x, within what a number can hold: contradictory points allow laws far beyond it."""
    return np.asarray(np.exp(np.clip(x, -LARGEST, LARGEST)))


def line(x: Array, y: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """(slope, intercept) [...] of the weighted least squares of y on x, both [..., n]."""
    w = np.ones_like(y) if weights is None else weights
    total = w.sum(-1)
    mean_x, mean_y = (w * x).sum(-1) / total, (w * y).sum(-1) / total
    dx = x - mean_x[..., None]
    slope = (w * dx * (y - mean_y[..., None])).sum(-1) / (w * dx**2).sum(-1)
    return slope, mean_y - slope * mean_x


def log_error(theta: Array, x: Array) -> tuple[Array, Array]:
    """(ln E [b, n], its derivatives by θ [b, n, p]) of laws θ [b, p] at x [b, n] or [n]."""
    b, alpha = theta[:, :1], theta[:, 1:2]
    z = x + np.zeros_like(b)
    inner = np.zeros_like(z)
    if theta.shape[1] > 3:
        psi = theta[:, 3:4]
        z = np.logaddexp(x, psi)
        inner = np.exp(psi - z)  # dz/dψ
    power = b + alpha * z
    if theta.shape[1] == 2:
        return power, np.stack([np.ones_like(z), z], -1)
    value = np.log(theta[:, 2:3] + np.exp(power))
    share = np.exp(power - value)
    parts = [share, share * z, np.exp(-value), share * alpha * inner]
    return value, np.stack(parts[: theta.shape[1]], -1)


def descend(
    theta: Array, model: Model, y: Array, *, weights: Array | None = None, fixed: int | None = None,
    keep: Callable[[Array], None] = lambda theta: None, floor: int | None = 2, steps: int = STEPS,
) -> tuple[Array, Array]:  # fmt: skip
    """(θ [b, p], sums of squares [b]) after Levenberg and Marquardt from θ.

    model: θ → (ln E [b, n], its derivatives [b, n, p]); y [b, n]: ln E as measured. fixed: a number of θ that is held; keep:
    clips θ in place to what it can mean; floor: the number of θ, if there is one, that is never below 0.
    """
    theta, count = theta.copy(), theta.shape[1]
    free = [j for j in range(count) if j != fixed]
    w = np.ones_like(y) if weights is None else weights
    damping = np.full(len(theta), 1e-3)

    def squares(at: Array) -> tuple[Array, Array, Array]:
        value, slopes = model(at)
        rest = y - value
        return (w * rest**2).sum(-1), rest, slopes[..., free]

    best, rest, slopes = squares(theta)
    for _ in range(steps):
        weighted = slopes * w[..., None]
        downhill = np.einsum("bni,bn->bi", weighted, rest)
        normal = np.einsum("bni,bnj->bij", weighted, slopes)
        if floor in free:  # at 0 and pushed below: it stays, and the others move as if it were not there
            j = free.index(floor)
            stays = (theta[:, floor] <= 0) & (downhill[:, j] <= 0)
            normal[stays, j, :] = normal[stays, :, j] = downhill[stays, j] = 0.0
        scale = np.einsum("bii->bi", normal).copy()
        scale = np.maximum(scale, 1e-12 * scale.max(-1, keepdims=True) + 1e-300)
        normal += np.einsum("bi,ij->bij", scale * damping[:, None], np.eye(len(free)))
        step = np.linalg.solve(normal, downhill[..., None])[..., 0]
        tried = theta.copy()
        tried[:, free] += np.clip(step, -3, 3)
        keep(tried)
        found, tried_rest, tried_slopes = squares(tried)
        better = found < best
        damping = np.where(better, damping / 4, damping * 4).clip(1e-12, 1e12)
        settled = np.all((best - found)[better] <= 1e-13 * best[better] + 1e-300)
        theta[better], best[better] = tried[better], found[better]
        rest[better], slopes[better] = tried_rest[better], tried_slopes[better]
        if settled and np.all(better | (damping > 1e6)):
            break
    return theta, best


def settle(
    theta: Array, x: Array, y: Array, *, weights: Array | None = None, fixed: int | None = None, steps: int = STEPS
) -> tuple[Array, Array]:
    """`descend` for laws of this module: x [b, n] or [n] is ln C − o."""

    def keep(at: Array) -> None:
        # What a step can't mean: a saturating law that rises, an irreducible error below 0 or above all errors.
        if at.shape[1] > 2:
            if fixed != 1:
                at[:, 1] = at[:, 1].clip(*ALPHA)
            if fixed != 2:
                at[:, 2] = at[:, 2].clip(0.0, np.exp(y.max(-1)))
        if at.shape[1] > 3:
            at[:, 3] = at[:, 3].clip(-40, 40)

    return descend(theta, lambda at: log_error(at, x), y, weights=weights, fixed=fixed, keep=keep, steps=steps)


def fit(form: Form, x: Array, y: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """(θ [b, p], sums of squares [b]) of the best law of a form for y [b, n] at x [b, n] or [n]; the best of several starts."""
    x = np.broadcast_to(x, y.shape)
    if form == "power":
        slope, intercept = line(x, y, weights)
        theta = np.stack([intercept, slope], -1)
        rest = y - log_error(theta, x)[0]
        return theta, ((1 if weights is None else weights) * rest**2).sum(-1)
    best, lowest = np.empty((len(y), PARAMETERS[form])), np.full(len(y), np.inf)
    offsets = (x.min(-1) - 3, x.min(-1)) if form == "double" else (None,)
    for share in STARTS:
        for offset in offsets:
            irreducible = share * np.exp(y.min(-1))
            above = np.log(np.maximum(np.exp(y) - irreducible[:, None], 1e-3 * np.exp(y)))
            slope, intercept = line(x, above, weights)
            parts = [intercept, slope.clip(*ALPHA), irreducible, *([] if offset is None else [offset])]
            theta, squares = settle(np.stack(parts, -1), x, y, weights=weights)
            better = squares < lowest
            best[better], lowest[better] = theta[better], squares[better]
    return best, lowest


def law_of(theta: Array, origin: float, form: Form) -> Law:
    """The law of one θ [p] about an origin."""
    beta = float(bounded_exp(theta[0] - theta[1] * origin))
    irreducible = float(theta[2]) if len(theta) > 2 else 0.0
    return Law(form, float(theta[1]), beta, irreducible, float(np.exp(theta[3] + origin)) if len(theta) > 3 else 0.0)
