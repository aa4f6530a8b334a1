"""The law of model, data and samples seen together: what each would have to be for an error.

E = E∞ + A·(G/g)^−a + B·(S/s)^−b + D·(U/u)^−d, with G the GMACs of a sample's forward, S the samples seen and U the different ones
among them (at most the data set), each about the runs' geometric mean. The sum of powers is that of Hoffmann et al. 2022 (their
approach 3), with a term for the data set, which one epoch has no need of. What the runs don't vary has no term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsclip.scaling.law import Array, descend
from dsclip.scaling.points import Point

FACTORS = ("gmacs_per_sample", "samples_seen", "different_samples")
EXPONENTS = (0.0, 3.0)
MIN_VARIED = 3  # sizes of a factor, from which on it has a term: two allow no law


@dataclass(frozen=True)
class JointLaw:
    """b laws. factors: those that have a term; centre [k]: ln of their geometric means; theta [b, 2k + 1]: E∞ last."""

    factors: list[str]
    centre: Array
    theta: Array
    noise: float
    """Standard deviation of ln E about the law."""
    points: int

    def error(self, sizes: Array) -> Array:
        """E [b, m] at sizes [m, 3] (GMACs a sample, samples seen, different samples) or [b, m, 3]."""
        return np.exp(_log_error(self.theta, self._z(sizes))[0])

    def _z(self, sizes: Array) -> Array:
        kept = [FACTORS.index(f) for f in self.factors]
        z = np.log(sizes[..., kept]) - self.centre
        return np.broadcast_to(z, (len(self.theta), *z.shape[-2:]))


def sizes_of(points: Sequence[Point]) -> Array:
    """[n, 3]: GMACs a sample, samples seen, and the different ones among these, of points that know them."""
    rows = [(p.gmacs_per_sample or 0, p.samples_seen or 0, p.data_samples or np.inf) for p in points]
    return np.array([(g, s, min(s, u)) for g, s, u in rows])


def fit_joint(points: Sequence[Point], draws: int, rng: np.random.Generator) -> tuple[JointLaw, JointLaw] | None:
    """(the law, resamples of it); None where the points don't vary model and samples seen enough, or are too few."""
    known = [p for p in points if p.gmacs_per_sample and p.samples_seen]
    if not known:
        return None
    sizes, y = sizes_of(known), np.log(np.array([p.error for p in known]))[None]
    factors = [f for j, f in enumerate(FACTORS) if len(np.unique(np.round(np.log(sizes[:, j]), 1))) >= MIN_VARIED]
    free = 2 * len(factors) + 1
    if not {"gmacs_per_sample", "samples_seen"} <= set(factors) or len(known) < free + 3:
        return None
    kept = [FACTORS.index(f) for f in factors]
    logs = np.log(sizes[:, kept])
    centre = logs.mean(0)
    z = (logs - centre)[None]
    smallest = np.exp(y.min())
    starts = [_start(len(factors), smallest, share) for share in (0.0, 0.5)]
    results = [_settle(start[None], z, y, np.ones_like(y)) for start in starts]
    theta, squares = min(results, key=lambda found: float(found[1][0]))
    noise = float(np.sqrt(squares[0] / (len(known) - free)))
    whole = JointLaw(factors, centre, theta, noise, len(known))
    counts = rng.multinomial(len(known), np.full(len(known), 1 / len(known)), size=draws).astype(np.float64)
    again, _ = _settle(
        np.repeat(theta, draws, 0), np.repeat(z, draws, 0), np.repeat(y, draws, 0), counts
    )  # fmt: skip
    return whole, JointLaw(factors, centre, again, noise, len(known))


def _start(terms: int, smallest: float, share: float) -> Array:
    """Equal terms with the exponents of published laws' order, and a share of the smallest error that is irreducible."""
    amplitude = np.log(smallest * (1.5 - share) / terms)
    return np.array([amplitude] * terms + [0.3] * terms + [share * smallest])


def _settle(theta: Array, z: Array, y: Array, weights: Array) -> tuple[Array, Array]:
    terms = z.shape[-1]

    def keep(at: Array) -> None:
        at[:, :terms] = at[:, :terms].clip(-30, 5)
        at[:, terms : 2 * terms] = at[:, terms : 2 * terms].clip(*EXPONENTS)
        at[:, -1] = at[:, -1].clip(0.0, np.exp(y.max(-1)))

    return descend(
        theta, lambda at: _log_error(at, z), y, weights=weights, keep=keep, floor=theta.shape[1] - 1, steps=200
    )  # fmt: skip


def _log_error(theta: Array, z: Array) -> tuple[Array, Array]:
    """(ln E [b, m], derivatives [b, m, p]) at z [b, m, k] = ln size − centre; θ = (ln amplitudes, exponents, E∞)."""
    terms = z.shape[-1]
    parts = np.exp(theta[:, None, :terms] - theta[:, None, terms : 2 * terms] * z)
    error = theta[:, None, -1] + parts.sum(-1)
    shares = parts / error[..., None]
    return np.log(error), np.concatenate([shares, -shares * z, 1 / error[..., None]], -1)
