"""How well points determine a law: intervals of its numbers, and of the error of a run that hasn't been made.

The intervals of a law's numbers hold all of them at once with 95%: they are the shadows of the region of laws that the points
don't refuse, SS(θ) ≤ SS·(1 + p·F/(n − p)), with Fisher's F for p numbers and n − p degrees of freedom (Scheffé). Taken alone
each holds its number more often. They follow the bend of SS, which a standard error doesn't. Noise is taken to be normal in
log E, equal for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsclip.scaling.law import ALPHA, PARAMETERS, Array, Form, bounded_exp, fit, line, log_error, settle
from dsclip.scaling.quantile import fisher, student

LEVEL = 0.95
HALVINGS = 28
LOG_BETA = 300.0  # how far from the estimate an end of β's interval is looked for, in powers of e


@dataclass(frozen=True)
class Fitted:
    """Laws of one form through b sets of n points. theta [b, p] about `origin`; squares [b]; x, y [b, n] natural logarithms."""

    form: Form
    theta: Array
    squares: Array
    x: Array
    y: Array
    origin: float

    @property
    def degrees(self) -> int:
        """Points beyond the law's numbers."""
        return int(self.y.shape[1]) - PARAMETERS[self.form]

    @property
    def allowed(self) -> float:
        """By how many times the noise's variance SS may rise for a law that is not refused: p·F."""
        numbers = PARAMETERS[self.form]
        return numbers * fisher(LEVEL, numbers, self.degrees)


def fit_all(form: Form, compute: Array, error: Array) -> Fitted:
    """The best laws of a form for errors [b, n] at compute [n] or [b, n], in GMACs. n must be above the form's numbers."""
    y = np.log(np.atleast_2d(error))
    x = np.broadcast_to(np.log(compute), y.shape)
    origin = float(x.mean())
    theta, squares = fit(form, x - origin, y)
    return Fitted(form, theta, squares, x, y, origin)


def alpha_interval(found: Fitted) -> Array:
    """[b, 2]: the exponent's."""
    if found.form == "power":
        return _line_interval(found)[0]
    return _ends(found, 1, np.broadcast_to(np.array(ALPHA), (len(found.theta), 2)))


def beta_interval(found: Fitted) -> Array:
    """[b, 2]: of the factor, the error at 1 GMAC without its irreducible part."""
    if found.form == "power":
        return bounded_exp(_line_interval(found)[1])
    # About C = 1 the first number of θ is ln β itself.
    at_one = found.theta.copy()
    at_one[:, 0] -= at_one[:, 1] * found.origin
    if found.form == "double":
        at_one[:, 3] += found.origin
    moved = Fitted(found.form, at_one, found.squares, found.x, found.y, 0.0)
    return bounded_exp(_ends(moved, 0, at_one[:, :1] + np.array([-LOG_BETA, LOG_BETA])))


def irreducible_interval(found: Fitted) -> Array:
    """[b, 2]: of the irreducible error; 0 where none at all fits as well. Of a power law 0 and 0."""
    if found.form == "power":
        return np.zeros((len(found.theta), 2))
    highest = np.exp(found.y.max(-1))
    return _ends(found, 2, np.stack([np.zeros_like(highest), highest], -1))


def prediction(found: Fitted, compute: Array, *, new_run: bool = True) -> tuple[Array, Array, Array]:
    """(E, low, high), each [b, m], at compute [m]: of a new run with its noise, or of the law itself.

    From the law's slopes at the estimate: exact for a power law, an approximation for the others.
    """
    x = np.log(np.asarray(compute, dtype=np.float64)) - found.origin
    at, there = log_error(found.theta, found.x - found.origin)[1], log_error(found.theta, x[None, :])
    normal = np.einsum("bni,bnj->bij", at, at)
    scale = np.einsum("bii->bi", normal).max(-1)[:, None, None]
    inverse = np.linalg.pinv(normal + 1e-13 * scale * np.eye(normal.shape[-1]), hermitian=True)
    spread = np.einsum("bmi,bij,bmj->bm", there[1], inverse, there[1])
    variance = (found.squares / found.degrees)[:, None] * (spread + (1.0 if new_run else 0.0))
    width = student(LEVEL, found.degrees) * np.sqrt(variance)
    return bounded_exp(there[0]), bounded_exp(there[0] - width), bounded_exp(there[0] + width)


def _line_interval(found: Fitted) -> tuple[Array, Array]:
    """(of the slope, of the intercept at C = 1) [b, 2] of a straight line."""
    slope, intercept = line(found.x, found.y)
    n, mean = found.x.shape[1], found.x.mean(-1)
    spread = ((found.x - mean[:, None]) ** 2).sum(-1)
    noise = np.sqrt(found.squares / found.degrees)
    far = noise * np.sqrt(found.allowed)
    widths = (far / np.sqrt(spread), far * np.sqrt(1 / n + mean**2 / spread))
    pairs = [np.stack([v - w, v + w], -1) for v, w in zip((slope, intercept), widths, strict=True)]
    return pairs[0], pairs[1]


def _ends(found: Fitted, which: int, far: Array) -> Array:
    """[b, 2]: where between the estimate and `far` [b, 2] the number θ[which] stops fitting; `far` where it fits even there."""
    theta, y = (np.repeat(a, 2, axis=0) for a in (found.theta, found.y))
    x = np.repeat(found.x, 2, axis=0) - found.origin
    limit = np.repeat(found.squares, 2) * (1 + found.allowed / found.degrees) + 1e-300
    inside, outside = theta[:, which].copy(), far.reshape(-1).copy()

    def at(value: Array) -> tuple[Array, Array]:
        held = theta.copy()
        held[:, which] = value
        return settle(held, x, y, fixed=which, steps=10)

    fits = at(outside)[1] <= limit
    for _ in range(HALVINGS):
        middle = (inside + outside) / 2
        moved, squares = at(middle)
        good = squares <= limit
        inside, outside = np.where(good, middle, inside), np.where(good, outside, middle)
        theta[good] = moved[good]
    return np.where(fits, far.reshape(-1), inside).reshape(-1, 2)
