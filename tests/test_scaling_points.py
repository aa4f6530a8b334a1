"""Points come from CSV files as they stand there, the published ones give the published laws; what can't be used is said."""

import numpy as np
import pytest

from dsclip.errors import UserError
from dsclip.scaling.bottleneck import series, short
from dsclip.scaling.joint import fit_joint
from dsclip.scaling.points import groups, named_size, parse, read_csv
from dsclip.scaling.study import fit_family, hold_out_largest

# α and β of Cherti et al. 2023, in the digits that their figures print, of OpenCLIP and of OpenAI's CLIP.
PUBLISHED = {
    ("imagenet1k", "acc1", "openclip"): (-0.11, 5.86),
    ("imagenet1k", "acc1", "openai"): (-0.16, 23.18),
    ("imagenet_robustness", "acc1", "openclip"): (-0.13, 11.61),
    ("imagenet_robustness", "acc1", "openai"): (-0.24, 211.66),
    ("mscoco_captions", "image_retrieval_recall@5", "openclip"): (-0.08, 2.75),
    ("mscoco_captions", "image_retrieval_recall@5", "openai"): (-0.05, 1.59),
    ("flickr30k", "image_retrieval_recall@5", "openclip"): (-0.19, 15.51),
    ("flickr30k", "image_retrieval_recall@5", "openai"): (-0.10, 2.21),
}
HEAD = "family,arch,samples_seen,gmacs_per_sample,train_data,test_data,acc1"


@pytest.fixture(scope="module")
def published():
    return groups(read_csv("published").points)


def test_the_published_coefficients_come_out_of_the_published_points(published):
    for key, (alpha, beta) in PUBLISHED.items():
        law = fit_family(published[key], draws=2, alternatives=False).power.law
        assert (round(law.alpha, 2), round(law.beta, 2)) == (alpha, beta), key
    law = fit_family(published["imagenet1k", "acc1", "openclip"], draws=2, alternatives=False).power.law
    assert (law.alpha, law.beta) == (pytest.approx(-0.1114, abs=5e-5), pytest.approx(5.8581, abs=5e-5))


def test_the_study_without_its_largest_run_predicts_it(published):
    for key in PUBLISHED:
        if key[2] == "openclip":
            held = hold_out_largest(published[key])
            assert held["within"] and held["extrapolated"] and "H-14" in held["run"]


def test_the_small_study_without_its_largest_run_predicts_it():
    """The committed points of docs/scaling.md; zero-shot top-5 is 100% in half of the runs and has too few points."""
    study = groups(read_csv("docs/points/demo_study.csv").points)
    held = {key[1]: hold_out_largest(points) for key, points in study.items() if key[1] != "top5"}
    assert len(held) == 8
    for metric, prediction in held.items():
        assert prediction["within"] and "w256_demo-8K_57K" in prediction["run"], metric


def test_the_law_of_model_data_and_samples_seen_predicts_a_larger_published_model(published):
    """ViT-bigG/14, 39B samples of LAION-2B: 80.1% on ImageNet (laion.ai/blog/giant-openclip); none of the points."""
    law, again = fit_joint(published["imagenet1k", "acc1", "openclip"], 500, np.random.default_rng(0))
    sizes = np.array([[532.92, 39e9, 2e9]])
    noise = np.exp(law.noise * np.random.default_rng(1).standard_normal(500))
    low, high = np.percentile(again.error(sizes)[:, 0] * noise, [2.5, 97.5])
    assert low <= 0.199 <= high <= 1.2 * low


def test_data_grown_alone_stops_to_help(published):
    found = [
        s.described(-0.11) for s in series(published["imagenet1k", "acc1", "openclip"])
        if s.varied == "data" and s.held == {"model": "ViT-B-16", "samples_seen": "2.5B"}
    ]  # fmt: skip
    assert [s["names"] for s in found] == [["LAION-80M", "LAION-400M", "LAION-2B"]]
    assert found[0]["bottleneck"] and found[0]["last_exponent"] > 0
    # The other way round: 34 instead of 13 billion samples of 80 million change nothing for B/32.
    few = [s for s in series(published["imagenet1k", "acc1", "openclip"]) if s.varied == "samples_seen"]
    held_back = {tuple(s.held.values()) for s in few if s.described(-0.11)["bottleneck"]}
    assert ("ViT-B-32", "LAION-80M") in held_back and ("ViT-B-32", "LAION-2B") not in held_back


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["family,acc1", "a,0.5"], "no column says what a run computed"),
        (["gmacs_total,family", "1,a"], "no column is a metric"),
        (["gmacs_total,acc1,acc1", "1,0.5,0.5"], "column `acc1` stands there twice"),
        ([HEAD], "holds no points"),
        ([HEAD, "a,m,1e9,7.4,d,t,many"], "line 2: `acc1` is 'many'; it must be a finite number"),
        ([HEAD, "a,m,1e9,7.4,d,t,57.4"], "line 2: `acc1` is 57.4; give shares between 0 and 1"),
        ([HEAD, "a,m,1e9,7.4,d,t"], "line 2: it has more or fewer cells"),
        ([HEAD, "a,m,-1e9,7.4,d,t,0.5"], "a run's compute must be above 0"),
        (["gmacs_total,gmacs_per_sample,samples_seen,acc1", "9,2,3,0.5"], "correct one of them"),
    ],
)
def test_what_can_not_be_read_is_said_with_its_line(rows, message):
    with pytest.raises(UserError) as error:
        parse(rows, "points.csv")
    assert message in str(error.value) and "points.csv" in str(error.value)


def test_runs_that_are_not_done_are_left_out_with_their_reason():
    rows = [f"{HEAD},run,status,reason", "a,m,1e9,7.4,d,t,0.5,one,done,", "a,m,1e9,7.4,d,t,,two,diverged,loss is nan"]
    table = parse(rows, "points.csv")
    assert [p.run for p in table.points] == ["one"]
    assert [(left.run, left.reason) for left in table.left_out] == [("two", "loss is nan")]
    perfect = parse([HEAD, "a,m,1e9,7.4,d,t,1.0"], "points.csv")
    assert not perfect.points and "an error of 0 has no logarithm" in perfect.left_out[0].reason


def test_losses_and_errors_are_errors_themselves():
    table = parse(["gmacs_total,val_loss,error,top1", "5,1.75,0.2,0.9"], "points.csv")
    assert [(p.metric, p.error) for p in table.points] == [
        ("val_loss", 1.75),
        ("error", 0.2),
        ("top1", pytest.approx(0.1)),
    ]


def test_sizes_have_names():
    assert named_size("LAION-400M") == 4e8 and named_size("DataComp-1.4B") == 1.4e9 and named_size("CLIP-WIT") is None
    assert [short(x) for x in (34.7e9, 2.44e9, 3e6, 999e6, 512)] == ["35B", "2.4B", "3M", "1B", "510"]
