"""tools/scaling_laws.py: JSON, figures, comparison and budget; wrong inputs end in one sentence."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.programs import run_program

TOOL = "tools/scaling_laws.py"
HEAD = "family,arch,samples_seen,gmacs_per_sample,train_data,test_data,acc1"


def write(path, rows):
    path.write_text("\n".join([HEAD, *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def two_families(tmp_path_factory):
    """`late` is worse at small compute and overtakes at 1e11 GMACs; both with a little noise."""
    rng = np.random.default_rng(0)
    rows = []
    for family, alpha, beta in (("early", -0.05, 0.4 * 1e11**0.05), ("late", -0.15, 0.4 * 1e11**0.15)):
        for seen in (1e9, 4e9, 16e9):
            for number, gmacs in enumerate((2, 8, 32, 128)):
                error = beta * (gmacs * seen) ** alpha * np.exp(0.01 * rng.standard_normal())
                rows.append(f"{family},m{number},{seen},{gmacs},data-400M,test,{1 - error}")
    return write(tmp_path_factory.mktemp("points") / "two.csv", rows)


def run(*arguments):
    done = run_program(TOOL, *arguments, "--json")
    return done.returncode, json.loads(done.stdout)


def test_fits_have_the_keys_that_others_rely_on():
    code, found = run("published", "--task", "imagenet1k", "--draws", "50")
    assert code == 0
    fits = {fit["family"]: fit for fit in found["fits"]}
    assert [round(fits["openclip"][k], 2) for k in ("alpha", "beta")] == [-0.11, 5.86]
    assert fits["openai"]["task"] == "imagenet1k" and fits["openai"]["method"] == "all"
    for fit in found["fits"]:
        assert fit["alpha_ci95"][0] <= fit["alpha"] <= fit["alpha_ci95"][1]
    assert fits["openclip"]["predictions"][-1]["extrapolated"]
    assert set(fits["openclip"]["alternatives"]) == {"power", "saturating", "double"}


def test_few_runs_say_little_and_break_nothing(tmp_path):
    """Two runs have no noise to be seen; three that contradict each other leave every law possible. Numbers stay numbers."""
    two = run(
        write(tmp_path / "two.csv", ["f,m,1e9,7,d,t,0.5", "f,m,4e9,7,d,t,0.6"]),
        "--out",
        tmp_path / "out",
        "--form",
        "best",
    )
    fit = two[1]["fits"][0]
    assert two[0] == 0 and fit["alpha_ci95"] is None and fit["predictions"][0]["error_ci95"] is None
    wild = [f"f,m,{seen},7,d,t,{1 - error}" for seen, error in ((1e9, 0.9), (1.1e9, 1e-6), (1.2e9, 0.9))]
    done = run_program(TOOL, write(tmp_path / "wild.csv", wild), "--json")
    assert done.returncode == 0 and "Infinity" not in done.stdout and "NaN" not in done.stdout


def test_families_may_be_the_training_data():
    _, found = run("published", "--task", "imagenet1k", "--by-data", "--draws", "40", "--form", "best")
    exponents = {fit["family"]: fit["alpha"] for fit in found["fits"]}
    assert set(exponents) == {"LAION-80M", "LAION-400M", "LAION-2B", "CLIP-WIT"}
    assert exponents["LAION-2B"] < exponents["LAION-400M"] < exponents["LAION-80M"], "more data, a steeper law"


def test_equal_calls_give_equal_tables(two_families):
    assert run(two_families, "--method", "all") == run(two_families, "--method", "all")


def test_families_are_compared_at_equal_compute(two_families):
    _, found = run(two_families, "--compare", "early", "late", "--method", "all")
    crossing = found["compare"][0]["crossing"]
    assert (crossing["overtakes"], crossing["overtaken"]) == ("late", "early")
    assert crossing["compute_ci95"][0] <= 1e11 <= crossing["compute_ci95"][1]
    assert crossing["compute"] == pytest.approx(1e11, rel=0.3)
    assert 1e11 <= crossing["ahead_with_95_from"] <= 3e11 and not crossing["extrapolated"]
    first, last = found["compare"][0]["at"][0], found["compare"][0]["at"][-1]
    assert (first["leads"], last["leads"]) == ("early", "late") and min(first["confidence"], last["confidence"]) > 0.99


def test_the_study_of_2025_needs_a_law_that_saturates_at_both_ends_and_mammut_overtakes_clip():
    code, found = run(
        "published2025", "--task", "imagenet1k", "--form", "best", "--compare", "clip", "mammut", "--draws", "200"
    )
    assert code == 0 and {fit["form"] for fit in found["fits"]} == {"double"}
    for fit in found["fits"]:
        laws = fit["alternatives"]
        assert laws["double"]["aicc"] < laws["power"]["aicc"] - 50 and laws["double"]["irreducible_ci95"][0] > 0
    crossing = found["compare"][0]["crossing"]
    assert crossing["overtakes"] == "mammut" and 1e10 < crossing["compute"] < 1e11
    assert crossing["behind_with_95_until"] < crossing["compute"] < crossing["ahead_with_95_from"]


def test_a_budget_buys_the_model_with_the_lowest_predicted_error(tmp_path):
    rows = []
    for arch, gmacs in (("ViT-B-32", 7.4), ("ViT-B-16", 20.57), ("ViT-L-14", 87.73), ("ViT-H-14", 190.97)):
        for seen in (1e9, 3e9, 1e10, 3e10):
            rows.append(f"f,{arch},{seen},{gmacs},data-2B,test,{1 - 0.4 * gmacs**-0.4 - 12 * seen**-0.2}")
    path = write(tmp_path / "sizes.csv", rows)
    options = ["--gpu", "H100", "--gpus", "8", "--batch", "2048", "--draws", "60"]
    small, large = (run(path, "--budget", hours, *options)[1]["budget"][0] for hours in ("300", "30000"))
    for found in (small, large):
        best = found["best"]
        assert best["error"] == min(c["error"] for c in found["candidates"])
        expected = 0.4 * (best["gmacs"] / best["samples_seen"]) ** -0.4 + 12 * best["samples_seen"] ** -0.2
        assert best["error"] == pytest.approx(expected, rel=0.01)
        assert best["error_ci95"][0] <= best["error"] <= best["error_ci95"][1]
        assert best["samples_per_second_range"][0] < best["samples_per_second"] < best["samples_per_second_range"][1]
    assert large["best"]["gmacs"] > small["best"]["gmacs"] and large["best"]["error"] < small["best"]["error"]
    assert any("the compute" in what for what in large["best"]["extrapolated"])
    known = [c for c in small["candidates"] if c["model"] == "ViT-L-14"][0]
    assert not any("the model" in what for what in known["extrapolated"])


def test_figures_and_a_page_are_written(two_families, tmp_path):
    _, found = run(two_families, "--out", tmp_path / "out")
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".svg", ".png", ".html"}
    for name in found["files"]:
        if name.endswith(".svg"):
            ElementTree.parse(name)
        elif name.endswith(".png"):
            with Image.open(name) as picture:
                assert len(picture.convert("RGB").getcolors(1 << 24)) > 20, "an empty picture"
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<svg") == 3 and "late" in page and "src=" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv"], "nowhere.csv: No such file"),
        (["published", "--task", "imagenet"], "Did you mean `imagenet1k`?"),
        (["published", "--compare", "openclip", "opnai"], "Did you mean `openai`?"),
        (["published", "--compare", "openai", "openai"], "give two different families"),
        (["published", "--budget", "100"], "--budget and --gpu belong together"),
        (["published", "--budget", "-1", "--gpu", "H100"], "it must be greater than 0"),
        (["published", "--budget", "1", "--gpu", "H100", "--gpus", "3"], "3 GPUs can't share evenly"),
        (["published", "--budget", "1", "--gpu", "B9000"], "B9000 is not known here"),
        (["published", "--draws", "3"], "95% of fewer than 40 draws"),
        (
            ["published", "--form", "double"],
            "openai has 3 runs on imagenet1k, too few of them for that law; take power or best",
        ),
        (["tests"], "tests holds no runs"),
    ],
)
def test_wrong_inputs_end_in_one_sentence(arguments, message):
    code, found = run(
        *arguments, *(["--task", "imagenet1k"] if "--task" not in arguments and "published" in arguments else [])
    )
    assert code == 2 and message in found["error"] and "\n" not in found["error"]


def test_a_budget_needs_runs_that_vary(two_families, tmp_path):
    rows = [f"f,m,{seen},7.4,d,t,0.5" for seen in (1e9, 2e9, 4e9)]
    code, found = run(write(tmp_path / "few.csv", rows), "--budget", "10", "--gpu", "H100")
    assert code == 2 and "--budget needs runs of at least 3 models" in found["error"]
    flat = run(tmp_path / "few.csv")[1]
    assert flat["fits"][0]["alpha"] == 0 and flat["bottlenecks"][0]["bottleneck"]
    one = run(write(tmp_path / "one.csv", ["f,m,1e9,7.4,d,t,0.5"]))[1]
    assert not one["fits"] and "a law needs two different computes" in one["unfitted"][0]["reason"]
