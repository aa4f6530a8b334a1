"""What a family's runs say about its law: the power law, alternatives, intervals, and resamples of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dsclip.errors import UserError
from dsclip.scaling.frontier import Method, method_for, pareto, select, selected
from dsclip.scaling.intervals import (
    Fitted,
    alpha_interval,
    beta_interval,
    fit_all,
    irreducible_interval,
    prediction,
)
from dsclip.scaling.law import PARAMETERS, Array, Form, Law, bounded_exp, fit, law_of, log_error, settle
from dsclip.scaling.points import Point

MIN_RESAMPLED = 8  # runs, below which resamples hold too few different ones: then draws come from Student's t
RESAMPLED_STEPS = 30  # from the estimate, which resamples are near
AHEAD = (2.0, 5.0, 10.0)  # of the largest compute: where every fit is extrapolated to


@dataclass(frozen=True)
class Fit:
    """One law through a family's points. Numbers, intervals [low, high] of 95%, and how well it fits."""

    law: Law
    fitted: Fitted
    alpha_ci95: tuple[float, float] | None = None
    beta_ci95: tuple[float, float] | None = None
    irreducible_ci95: tuple[float, float] | None = None

    @property
    def points(self) -> int:
        """How many the law goes through."""
        return int(self.fitted.y.shape[1])

    @property
    def rms(self) -> float:
        """Of what is left in log10 E."""
        return float(np.sqrt(self.fitted.squares[0] / self.points) / np.log(10))

    @property
    def aicc(self) -> float | None:
        """Akaike's criterion, corrected for few points (the noise counts as a number); None with too few."""
        k, n = PARAMETERS[self.law.form] + 1, self.points
        if n <= k + 1:
            return None
        return float(n * np.log(max(self.fitted.squares[0], 1e-300) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1))


@dataclass(frozen=True)
class FamilyFit:
    """All that is said of one family on one task. law: of the form that was asked for, which predictions are made from.

    draws: θ [d, p] of that form about `origin`, as they might as well be.
    """

    task: str
    metric: str
    family: str
    method: Method
    runs: list[Point]
    power: Fit
    law: Fit
    draws: Array
    draws_from: str
    front: list[Point] = field(default_factory=list)
    alternatives: dict[str, Fit] = field(default_factory=dict)

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest compute of the runs."""
        computes = [p.compute for p in self.runs]
        return min(computes), max(computes)

    def drawn(self, compute: Array) -> Array:
        """[d, m]: ln E of every draw's law at each compute."""
        return log_error(self.draws, np.log(compute) - self.law.fitted.origin)[0]

    def band(self, compute: Array) -> tuple[Array, Array]:
        """(low, high) [m]: 95% of the draws' laws at each compute."""
        low, high = bounded_exp(np.percentile(self.drawn(compute), [2.5, 97.5], axis=0))
        return low, high


def fit_family(
    runs: Sequence[Point], *, method: Method | None = None, form: Form | Literal["best"] = "power", draws: int = 1000, seed: int = 0,
    alternatives: bool = True,
) -> FamilyFit | None:  # fmt: skip
    """The fits of runs of one family on one task; None where fewer than two different computes are left to fit.

    form: of the law that predictions are made from; `best`: of the lowest AICc through the same runs. Raises UserError where the
    runs are too few for it.
    """
    compute, error = np.array([p.compute for p in runs]), np.array([p.error for p in runs])
    method = method or method_for(len(runs))
    x, y = selected(compute, error, method)
    if len(np.unique(x)) < 2:
        return None
    front = [runs[i] for i in pareto(compute, error)]
    power = _fit("power", x, y)
    # Bins are too few for three numbers: the front has all that no other run beats.
    through: Method = "pareto" if method == "study" else method
    others: dict[str, Fit] = {}
    if alternatives or form != "power":
        cx, cy = selected(compute, error, through)
        for other in PARAMETERS:
            if len(cx) >= PARAMETERS[other] + 2 and len(np.unique(cx)) > PARAMETERS[other]:
                others[other] = _fit(other, cx, cy)
    law = _chosen(power, others, form, runs)
    rng = np.random.default_rng(seed)
    drawn, source = coefficients(compute, error, method if law is power else through, law, draws, rng)
    first = runs[0]
    return FamilyFit(
        first.task, first.metric, first.family, method if law is power else through, list(runs), power, law, drawn, source, front,
        others,
    )  # fmt: skip


def _chosen(power: Fit, laws: dict[str, Fit], form: str, runs: Sequence[Point]) -> Fit:
    """The law that predictions are made from; of `best` the power law where the runs are too few for another."""
    if form == "best":
        criteria = {name: fit.aicc for name, fit in laws.items() if fit.aicc is not None}
        enough = criteria and len(runs) >= MIN_RESAMPLED
        form = min(criteria, key=lambda name: criteria[name] or 0.0) if enough else "power"
    if form == "power":
        return power
    if form not in laws or len(runs) < MIN_RESAMPLED:
        raise UserError(
            f"--form {form}: {runs[0].family} has {len(runs)} runs on {runs[0].task}, too few of them for that law; take power or best"
        )
    return laws[form]


def _fit(form: Form, compute: Array, error: Array) -> Fit:
    fitted = fit_all(form, compute, error)
    law = law_of(fitted.theta[0], fitted.origin, form)
    if fitted.degrees < 1:
        return Fit(law, fitted)
    ends = [_pair(interval(fitted)) for interval in (alpha_interval, beta_interval, irreducible_interval)]
    return Fit(law, fitted, ends[0], ends[1], ends[2] if form != "power" else None)


def _pair(ends: Array) -> tuple[float, float]:
    return float(ends[0, 0]), float(ends[0, 1])


def coefficients(
    compute: Array, error: Array, method: Method, law: Fit, draws: int, rng: np.random.Generator
) -> tuple[Array, str]:
    """(θ [d, p] about the law's origin, what they were drawn from): resamples of the runs, each fitted with the whole method."""
    if len(compute) < MIN_RESAMPLED:
        return _student_draws(law.fitted, draws, rng), "Student's t of the least squares"
    picked = rng.integers(len(compute), size=(draws, len(compute)))
    x, y, weights = select(np.log10(compute)[picked], np.log10(error)[picked], method)
    ends = [np.where(weights > 0, x, far) for far in (np.inf, -np.inf)]
    several = ends[0].min(-1) < ends[1].max(-1)  # otherwise all of one compute, or in one bin: no line
    x, y, weights = x[several] * np.log(10) - law.fitted.origin, y[several] * np.log(10), weights[several]
    if law.law.form == "power":
        return fit("power", x, y, weights)[0], "resampled runs"
    start = np.repeat(law.fitted.theta, len(y), axis=0)
    return settle(start, x, y, weights=weights, steps=RESAMPLED_STEPS)[0], "resampled runs"


def _student_draws(fitted: Fitted, draws: int, rng: np.random.Generator) -> Array:
    """Lines as far off as n points with normal noise allow, with n − 2 degrees of freedom; θ [d, 2]."""
    x = fitted.x[0] - fitted.origin
    if fitted.degrees < 1:  # two points: no noise can be seen
        return np.repeat(fitted.theta, draws, axis=0)
    noise = np.sqrt(fitted.squares[0] / fitted.degrees)
    t = rng.standard_normal((draws, 2)) / np.sqrt(rng.chisquare(fitted.degrees, (draws, 1)) / fitted.degrees)
    # About the mean of x, where the origin is, intercept and slope are independent.
    return np.asarray(fitted.theta[0] + noise * t / np.sqrt(np.array([len(x), (x**2).sum()])))


def extrapolate(fit: FamilyFit, compute: Sequence[float]) -> list[dict[str, Any]]:
    """[{"compute", "error", "error_ci95", "extrapolated"}] of a new run; no interval without spare points."""
    at = np.asarray(compute, dtype=np.float64)
    errors = fit.law.law.error(at)
    ends: list[list[float] | None] = [None] * len(at)
    if fit.law.fitted.degrees > 0:
        _, low, high = prediction(fit.law.fitted, at)
        ends = [[float(a), float(b)] for a, b in zip(low[0], high[0], strict=True)]
    low_end, high_end = fit.range
    return [
        {
            "compute": float(c),
            "error": float(e),
            "error_ci95": ends[i],
            "extrapolated": bool(not low_end <= c <= high_end),
        }
        for i, (c, e) in enumerate(zip(at, errors, strict=True))
    ]


def hold_out_largest(
    runs: Sequence[Point], method: Method | None = None, form: Form | Literal["best"] = "power"
) -> dict[str, Any] | None:
    """What the fit from all but the largest run says of that run, and whether it lies within the interval; None with too few."""
    largest = max(runs, key=lambda p: p.compute)
    rest = [p for p in runs if p.compute < largest.compute]
    try:
        fit = fit_family(rest, method=method, form=form, draws=2, alternatives=False) if len(rest) > 2 else None
    except UserError:  # one run fewer is too few for the form
        return None
    if fit is None or fit.law.fitted.degrees < 1:
        return None
    said = extrapolate(fit, [largest.compute])[0]
    low, high = said["error_ci95"]
    return said | {"run": largest.run, "measured": largest.error, "within": low <= largest.error <= high}
