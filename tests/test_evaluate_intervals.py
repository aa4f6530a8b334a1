"""Bootstrap intervals: against resampling one value at a time in float64, and by how often they hold what is true."""

import json
import time

import numpy as np
import pytest
import torch

from dsclip.errors import UserError
from dsclip.evaluate import Measured, Outcomes, table, with_intervals
from dsclip.evaluate.results.intervals import bootstrap, interval, intervals
from dsclip.evaluate.results.report import markdown, text


def resampled(outcomes: Outcomes, resamples: int) -> torch.Tensor:
    """Samples drawn one at a time, in float64."""
    units, columns = outcomes.units.unique(return_inverse=True)
    generator, found = np.random.default_rng(7), []
    for _ in range(resamples):
        weights = torch.zeros(len(units), 1, dtype=torch.float64)
        for draw in generator.integers(0, len(units), len(units)):
            weights[draw] += 1
        found.append(outcomes.statistic(weights, columns))
    return torch.cat(found)


def cases():
    generator = torch.Generator().manual_seed(1)
    n = 90
    hits, groups = (torch.rand(n, generator=generator) < 0.7).float(), torch.randint(0, 5, (n,), generator=generator)
    captions = torch.arange(n) // 3  # all captions of every second image are right: a caption tells of its neighbours
    return {
        "hits": Outcomes(hits, torch.arange(n)),
        "hits of clusters": Outcomes((captions % 2).float(), captions),
        "classes": Outcomes(hits, torch.arange(n), "mean_of_groups", groups),
        "worst": Outcomes(hits, torch.arange(n), "worst_group", groups),
        "no two alike": Outcomes(torch.randn(n, generator=generator), torch.arange(n)),
        "gaps": Outcomes(torch.randn(n, generator=generator), torch.arange(n), "gap_of_groups", groups),
    }


@pytest.mark.parametrize("name", cases())
def test_the_resamples_are_distributed_as_those_drawn_one_at_a_time(name):
    outcomes = cases()[name]
    ours, reference = bootstrap([outcomes], 4000)[0], resampled(outcomes, 600)
    spread = reference.std()
    assert abs(ours.mean() - reference.mean()) < 0.15 * spread
    assert ours.std() == pytest.approx(spread.item(), rel=0.12)
    assert np.allclose(interval(ours), interval(reference), atol=0.4 * spread.item())


def test_captions_of_an_image_are_drawn_together():
    """As if they were independent, the interval would be the root of three too small."""
    outcomes = cases()["hits of clusters"]
    apart = Outcomes(outcomes.values, torch.arange(len(outcomes.values)))
    assert bootstrap([outcomes])[0].std() / bootstrap([apart])[0].std() == pytest.approx(3**0.5, rel=0.1)


@pytest.mark.parametrize("clusters", [False, True])
def test_the_interval_holds_the_true_share_nineteen_times_of_twenty(clusters):
    generator, held = torch.Generator().manual_seed(2), 0
    for _ in range(200):
        if clusters:  # each image has its own share of right captions, 0.4 on average
            share = torch.rand(150, 1, generator=generator) * 0.8
            hits = (torch.rand(150, 5, generator=generator) < share).float().flatten()
            outcomes = Outcomes(hits, torch.arange(150).repeat_interleave(5))
        else:
            outcomes = Outcomes((torch.rand(300, generator=generator) < 0.4).float(), torch.arange(300))
        low, high = intervals(Measured({"top1": outcomes}, {}))["top1"]
        held += low <= 0.4 <= high
    assert 176 <= held <= 200  # 95% of 200 is 190; 88% of them at least


def test_results_of_the_same_samples_share_their_resamples():
    """The difference of two models that are right on the same samples but for one is all but known."""
    generator = torch.Generator().manual_seed(3)
    first = (torch.rand(400, generator=generator) < 0.5).float()
    second = first.clone()
    second[0] = 1 - second[0]
    order = torch.randperm(400, generator=generator)
    one, two = Outcomes(first, torch.arange(400)), Outcomes(second[order], torch.arange(400)[order])
    a, b = bootstrap([one, two])
    assert (a - b).std() < 0.0035 < 0.02 < a.std()
    with pytest.raises(UserError, match="not of the same samples"):
        bootstrap([one, Outcomes(second, torch.arange(400) + 1)])


def test_fifty_thousand_samples_of_a_thousand_classes_take_less_than_a_second():
    hits, groups = (torch.arange(50_000) % 3 > 0).float(), torch.arange(50_000) * 7 % 1000
    start = time.process_time()
    intervals(
        Measured({"a": Outcomes(hits, torch.arange(50_000), "mean_of_groups", groups), "b": Outcomes(hits, torch.arange(50_000))}, {})
    )  # fmt: skip
    assert time.process_time() - start < 4  # 0.45 s where it was measured


def test_results_are_printed_with_their_intervals():
    measured = Measured({"top1": Outcomes(torch.tensor([1.0, 0, 1, 1] * 25), torch.arange(100))}, {"samples": 100})
    metrics = json.loads(json.dumps(with_intervals(measured)))
    low, high = metrics["top1_ci95"]
    assert list(metrics) == ["top1", "top1_ci95", "samples"] and 0.62 < low < 0.75 < high < 0.88
    assert table(metrics) == [("top1", "75.00%", f"{low:.2%} – {high:.2%}"), ("samples", "100", "")]
    result = {"task": "zeroshot", "model": "m", "data": "a|b", "training_pairs": None, "metrics": metrics, "bad_samples": {"no image": 2}}  # fmt: skip
    assert text(result).splitlines()[1].split() == ["top1", "75.00%", f"{low:.2%}", "–", f"{high:.2%}"]
    rows = markdown([result]).splitlines()
    assert rows[2] == f"| zeroshot | a\\|b | top1 | 75.00% | {low:.2%} – {high:.2%} |"
    assert rows[4] == "| zeroshot | a\\|b | left out: no image | 2 |  |"
