"""Laws are found where they are known, and their intervals hold what they say; each against a plain float64 reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.scaling.frontier import pareto, selected
from dsclip.scaling.intervals import (
    alpha_interval,
    beta_interval,
    fit_all,
    irreducible_interval,
    prediction,
)
from dsclip.scaling.joint import fit_joint, sizes_of
from dsclip.scaling.law import PARAMETERS, fit, law_of, line, log_error
from dsclip.scaling.points import Point
from dsclip.scaling.quantile import fisher, student
from dsclip.scaling.study import coefficients, fit_family

COMPUTE = np.logspace(9, 13, 14)


def drawn(alpha, beta, irreducible, noise, draws, seed=0, compute=COMPUTE):
    rng = np.random.default_rng(seed)
    return (irreducible + beta * compute**alpha) * np.exp(noise * rng.standard_normal((draws, len(compute))))


@pytest.mark.parametrize(
    ("found", "table"),
    [
        (student(0.95, 1), 12.7062), (student(0.95, 3), 3.18245), (student(0.95, 30), 2.04227),
        (fisher(0.95, 2, 10), 4.10282), (fisher(0.95, 3, 9), 3.86255), (fisher(0.95, 4, 1), 224.583),
    ],
)  # fmt: skip
def test_quantiles_are_those_of_tables(found, table):
    assert found == pytest.approx(table, rel=1e-5)


@pytest.mark.parametrize("form", PARAMETERS)
def test_derivatives_are_those_of_differences(form):
    rng = np.random.default_rng(1)
    theta = np.array([[-2.0, -0.3, 0.05, -1.0]])[:, : PARAMETERS[form]]
    x, step = rng.uniform(-4, 4, 9), 1e-6
    slopes = log_error(theta, x)[1]
    for j in range(PARAMETERS[form]):
        ends = [log_error(theta + sign * step * np.eye(PARAMETERS[form])[j], x)[0] for sign in (1, -1)]
        np.testing.assert_allclose(slopes[..., j], (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", PARAMETERS)
def test_a_law_without_noise_comes_back(form):
    truth = {"power": (0.0, 0.0), "saturating": (0.08, 0.0), "double": (0.08, 3e9)}[form]
    errors = truth[0] + 300 * (COMPUTE + truth[1]) ** -0.3
    found = fit_all(form, COMPUTE, errors)
    law = law_of(found.theta[0], found.origin, form)
    assert (law.alpha, law.beta) == (pytest.approx(-0.3, rel=1e-4), pytest.approx(300, rel=1e-3))
    assert law.irreducible == pytest.approx(truth[0], rel=1e-4)
    assert law.offset == pytest.approx(truth[1], rel=1e-3)
    np.testing.assert_allclose(law.error(COMPUTE), errors, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.floats(-0.5, -0.08), st.floats(0, 0.2), st.integers(0, 1000))
def test_no_law_of_a_dense_grid_fits_better(alpha, irreducible, seed):
    errors = drawn(alpha, 0.6 * 1e9**-alpha, irreducible, 0.03, 1, seed)
    x, y = np.log(COMPUTE) - np.log(COMPUTE).mean(), np.log(errors)
    a, e = (grid.ravel() for grid in np.meshgrid(np.linspace(-2, -0.01, 80), np.linspace(0, errors.max(), 60)))
    # With α and E∞ held the best β solves one equation, by Newton's steps in ln β.
    b = np.log(np.maximum(errors - e[:, None], 1e-9)).mean(-1) - a * x.mean()
    for _ in range(20):
        value, slopes = log_error(np.stack([b, a, e], -1), x)
        b += ((slopes[..., 0] * (y - value)).sum(-1) / (slopes[..., 0] ** 2).sum(-1)).clip(-2, 2)
    best = ((y - log_error(np.stack([b, a, e], -1), x)[0]) ** 2).sum(-1).min()
    assert fit("saturating", x, y)[1][0] <= best * (1 + 1e-6)


def test_weights_are_repeated_points():
    errors = drawn(-0.2, 20, 0.05, 0.05, 1)
    counts = np.array([0, 3, 1, 1, 2, 0, 1, 1, 1, 2, 1, 0, 1, 1])
    x, y = np.log(COMPUTE) - 23, np.log(errors)
    for form in ("power", "saturating"):
        weighted = fit(form, x, y, counts[None].astype(float))[0]
        np.testing.assert_allclose(weighted, fit(form, np.repeat(x, counts), np.repeat(y, counts, 1))[0], rtol=1e-4)


def test_the_power_laws_interval_is_the_textbooks():
    errors = drawn(-0.2, 20, 0, 0.05, 1)
    x, y = np.log(COMPUTE), np.log(errors[0])
    design = np.stack([x, np.ones_like(x)], -1)
    theta = np.linalg.lstsq(design, y, rcond=None)[0]
    variance = ((y - design @ theta) ** 2).sum() / (len(x) - 2)
    widths = np.sqrt(2 * fisher(0.95, 2, len(x) - 2) * variance * np.diag(np.linalg.inv(design.T @ design)))
    found = fit_all("power", COMPUTE, errors)
    np.testing.assert_allclose(alpha_interval(found)[0], [theta[0] - widths[0], theta[0] + widths[0]], rtol=1e-6)
    np.testing.assert_allclose(beta_interval(found)[0], np.exp([theta[1] - widths[1], theta[1] + widths[1]]), rtol=1e-6)
    at = np.array([np.log(1e14), 1])
    width = student(0.95, 12) * np.sqrt(variance * (1 + at @ np.linalg.inv(design.T @ design) @ at))
    _, low, high = prediction(found, np.array([1e14]))
    np.testing.assert_allclose([low[0, 0], high[0, 0]], np.exp(at @ theta + np.array([-width, width])), rtol=1e-6)


LAWS = [(-0.11, 5.86, 0.0, 0.03), (-0.2, 20.0, 0.0, 0.05), (-0.3, 300.0, 0.1, 0.02), (-0.16, 23.0, 0.05, 0.03)]


@pytest.mark.parametrize(("alpha", "beta", "irreducible", "noise"), LAWS)
def test_known_laws_come_back_within_the_intervals_in_93_of_100_draws(alpha, beta, irreducible, noise):
    draws = 100 if irreducible else 1000
    found = fit_all("saturating" if irreducible else "power", COMPUTE, drawn(alpha, beta, irreducible, noise, draws))
    within = np.ones(draws, dtype=bool)
    for truth, ends in (
        (alpha, alpha_interval(found)),
        (beta, beta_interval(found)),
        (irreducible, irreducible_interval(found)),
    ):
        within &= (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    assert within.mean() >= 0.93


@pytest.mark.parametrize(("alpha", "beta", "irreducible", "noise"), LAWS)
def test_a_larger_run_lies_within_its_interval_in_93_of_100_draws(alpha, beta, irreducible, noise):
    draws, at = 1000, np.array([4 * COMPUTE[-1]])
    form = "saturating" if irreducible else "power"
    found = fit_all(form, COMPUTE, drawn(alpha, beta, irreducible, noise, draws))
    new = drawn(alpha, beta, irreducible, noise, draws, seed=9, compute=at)
    _, low, high = prediction(found, at)
    assert ((low <= new) & (new <= high)).mean() >= 0.93


def test_an_irreducible_error_is_none_where_none_is_needed():
    found = fit_all("saturating", COMPUTE, drawn(-0.2, 20, 0, 0.02, 20))
    assert (irreducible_interval(found)[:, 0] == 0).mean() >= 0.9


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_front_is_what_none_beats(pairs):
    compute, error = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
    front = pareto(compute, error)
    slow = {
        (c, e) for c, e in pairs if not any(a <= c and b < e or a < c and b <= e for a, b in pairs)
    }  # fmt: skip
    assert {(compute[i], error[i]) for i in front} == slow
    x, y = selected(compute, error, "pareto")
    np.testing.assert_allclose(sorted(zip(x, y, strict=True)), sorted(slow))


def test_draws_are_the_whole_method_on_resampled_runs():
    rng = np.random.default_rng(3)
    compute = 10 ** rng.uniform(9, 13, 30)
    error = 5 * compute**-0.11 * np.exp(np.abs(0.1 * rng.standard_normal(30)))
    runs = [Point("f", "t", "m", c, e) for c, e in zip(compute, error, strict=True)]
    for method in ("study", "pareto", "all"):
        power = fit_family(runs, method=method, draws=1).power
        found, _ = coefficients(compute, error, method, power, 20, np.random.default_rng(7))
        picked = np.random.default_rng(7).integers(30, size=(20, 30))
        origin = power.fitted.origin
        for indices, (intercept, slope) in zip(picked, found, strict=True):
            x, y = selected(compute[indices], error[indices], method)
            expected = np.polyfit(np.log10(x), np.log10(y), 1)
            beta = (intercept - slope * origin) / np.log(10)
            np.testing.assert_allclose([slope, beta], expected, rtol=1e-6)


def test_a_line_is_least_squares():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 5, 8))
    for row in range(5):
        np.testing.assert_allclose([v[row] for v in line(x, y)], np.polyfit(x[row], y[row], 1))


def test_the_joint_law_finds_what_each_factor_does():
    sizes = [(g, s, u) for g in (1, 4, 16, 64) for s in (1e8, 1e9, 1e10, 1e11) for u in (3e8, 3e9, 3e10)]
    errors = [0.05 + 0.2 * g**-0.4 + 30 * s**-0.3 + 400 * min(s, u) ** -0.45 for g, s, u in sizes]
    points = [Point("f", "t", "m", g * s, e, f"m{g}", g, s, "d", u) for (g, s, u), e in zip(sizes, errors, strict=True)]
    law, again = fit_joint(points, 5, np.random.default_rng(0))
    np.testing.assert_allclose(law.theta[0, 3:], [0.4, 0.3, 0.45, 0.05], rtol=1e-3)
    np.testing.assert_allclose(law.error(sizes_of(points))[0], errors, rtol=1e-5)
    assert again.theta.shape == (5, 7)
    alike = [Point("f", "t", "m", 1e9, 0.3, "m1", 1.0, 1e9, "d", 1e8)] * 20
    assert fit_joint(alike, 5, np.random.default_rng(0)) is None
