"""When a loss has jumped: the rule against float64 windows, on noise, planted jumps and the fall at the start."""

import json
import math

import numpy as np
import pytest

from dsclip.train.spike_rule import SpikeRule, deviations

WINDOW, THRESHOLD = 100, 8.0


def reference(x: np.ndarray, least: float) -> np.ndarray:
    """Robust deviations of x[WINDOW:] from the WINDOW numbers before each, in float64."""
    windows = np.lib.stride_tricks.sliding_window_view(x, WINDOW)[:-1]
    middle = np.median(windows, axis=1)
    spread = 1.4826 * np.median(np.abs(windows - middle[:, None]), axis=1)
    return (x[WINDOW:] - middle) / np.maximum(spread, least)


def spikes(losses, norms=None, rule=None) -> list:
    rule = rule or SpikeRule(WINDOW, THRESHOLD)
    norms = np.ones(len(losses)) if norms is None else norms
    found = [rule.judge(step, float(x), float(n)) for step, (x, n) in enumerate(zip(losses, norms, strict=True), 1)]
    return [spike for spike in found if spike is not None]


def test_deviations_are_those_of_float64_windows():
    x = np.random.default_rng(0).standard_t(3, 400) + 10
    ours = [deviations(x[t], x[t - WINDOW : t], 1e-3) for t in range(WINDOW, len(x))]
    assert ours == pytest.approx(reference(x, 1e-3), rel=1e-12)
    assert math.isnan(deviations(1.0, [], 0.1)) and deviations(3.0, [2.0, 2.0], 0.5) == 2.0


@pytest.mark.parametrize("noise", ["normal", "laplace"])
def test_noise_gives_no_alarm(noise):
    """Stated: none in a million steps of normal noise, a few with Laplace's long tails; here ten thousand by the rule itself."""
    rng = np.random.default_rng(1)
    losses, log_norms = (getattr(rng, noise)(size=10_000) for _ in range(2))
    assert spikes(2 + 0.05 * losses, np.exp(0.3 * log_norms)) == []


def test_the_stated_rate_by_a_count_of_windows():
    """Pairs of steps within ten, one of them by its loss, in 50,000 steps; the rule tells no more than these."""
    rng, found = np.random.default_rng(7), {}
    for noise in ("normal", "laplace"):
        loss, norm = (reference(getattr(rng, noise)(size=50_000), 1e-9) > THRESHOLD for _ in range(2))
        places = np.flatnonzero(loss | norm)
        found[noise] = sum(b - a < 10 and (loss[a] or loss[b]) for a, b in zip(places[:-1], places[1:], strict=True))
    assert found["normal"] == 0 and found["laplace"] <= 1


@pytest.mark.parametrize("jump", [0.5, 3.0, 100.0])
def test_a_planted_jump_is_found_at_its_second_step_and_told_once(jump):
    rng = np.random.default_rng(3)
    for place in rng.integers(WINDOW, 900, 5):
        losses = 1.5 + 0.03 * rng.normal(size=1000)
        losses[place : place + 30] += jump
        [spike] = spikes(losses)
        assert (spike.first, spike.last) == (place + 1, place + 2), "steps are counted from 1"
        assert (
            spike.worst in (place + 1, place + 2)
            and spike.loss == losses[spike.worst - 1]
            and spike.usual == pytest.approx(1.5, abs=0.02)
        )
        assert f"steps {place + 1} to {place + 2}" in str(spike)


def test_a_norm_that_jumps_dates_the_beginning_and_is_no_spike_alone():
    losses, norms = np.full(300, 2.0), np.full(300, 0.5)
    norms[199:230] = 40.0
    assert spikes(losses, norms) == []
    losses[204:] = 3.0
    [spike] = spikes(losses, norms)
    assert (spike.first, spike.last) == (200, 205)


def test_the_figures_are_those_of_the_step_whose_loss_deviates_most_also_after_a_resume():
    losses, norms = np.full(300, 2.0), np.full(300, 0.5)
    losses[210] = 9.0
    losses[216], norms[216] = 2.01, 40.0  # deviates by its norm alone
    [spike] = spikes(losses, norms)
    assert (spike.first, spike.last, spike.worst, spike.loss, spike.usual) == (211, 217, 211, 9.0, 2.0)
    assert spike.deviations == pytest.approx(350) and "steps 211 to 217: 9 in step 211, where 2 was usual" in str(spike)
    rule = SpikeRule(WINDOW, THRESHOLD)
    for step in range(1, 217):
        rule.judge(step, losses[step - 1], norms[step - 1])
    resumed = SpikeRule(WINDOW, THRESHOLD, json.loads(json.dumps(rule.state())))
    assert resumed.judge(217, losses[216], norms[216]) == spike
    earlier_version = rule.state() | {"deviating": [(211, True)]}
    assert SpikeRule(WINDOW, THRESHOLD, earlier_version).judge(217, losses[216], norms[216]) is None


def test_one_step_alone_is_none_and_so_are_two_that_lie_apart():
    losses = np.full(400, 1.0)
    losses[[150, 160, 300]] = 9.0
    assert spikes(losses) == []
    losses[159] = 9.0
    assert [(s.first, s.last) for s in spikes(losses)] == [(151, 160)]


def test_the_fall_at_the_start_and_a_slow_rise_are_none():
    """A plateau at log N, the fall, and norms that rise twentyfold as learning begins; then a loss that creeps back up."""
    t, rng = np.arange(3000), np.random.default_rng(4)
    losses = 0.4 + (math.log(4096) - 0.4) / (1 + np.exp((t - 250) / 40)) + 0.02 * rng.normal(size=len(t))
    norms = np.exp(3 / (1 + np.exp(-(t - 200) / 10)) + 0.2 * rng.normal(size=len(t)))
    assert spikes(losses, norms) == []
    assert spikes(0.4 + t / 5000 + 0.02 * rng.normal(size=len(t))) == []


def test_a_plateau_without_noise_needs_a_rise_that_matters():
    assert spikes([2.0] * 200 + [2.1] * 50) == []
    assert len(spikes([2.0] * 200 + [2.2] * 50)) == 1
    assert spikes([0.0] * 200) == []


def test_a_resumed_rule_goes_on_as_if_nothing_had_happened():
    rng = np.random.default_rng(5)
    losses = 1 + 0.02 * rng.normal(size=400)
    losses[[210, 215]], losses[320:330] = 2.0, 5.0
    whole = spikes(losses)
    assert [(s.first, s.last) for s in whole] == [(211, 216), (321, 322)]
    for cut in (150, 212, 218, 321):
        rule, found = SpikeRule(WINDOW, THRESHOLD), []
        for step, loss in enumerate(losses, 1):
            found.append(rule.judge(step, float(loss), 1.0))
            if step == cut:
                rule = SpikeRule(WINDOW, THRESHOLD, json.loads(json.dumps(rule.state())))
        assert [spike for spike in found if spike] == whole


def test_what_is_not_finite_deviates_never():
    losses = [1.0] * 150 + [math.nan, 1.0, math.nan, 1.0]
    assert spikes(losses, [math.nan] * len(losses)) == []
