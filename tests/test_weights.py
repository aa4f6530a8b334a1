"""Soups and sparse differences: sums against float64, choices against all there are, files, and the commands on real models."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.checkpoint import Checkpoint, read_checkpoint
from dsclip.convert.dsclip_export import export_dsclip
from dsclip.errors import UserError
from dsclip.model import Clip, resolve_preset
from dsclip.weights.combine import combine
from dsclip.weights.difference import VALUES, compose, largest_changes, read_difference, write_difference
from dsclip.weights.soup import greedy
from tests.programs import run_program

TINY = dict(vision_layers=1, vision_width=32, vision_heads=1, vision_mlp_width=64, text_layers=1, text_width=32, text_heads=1,
            text_mlp_width=64, embed_dim=16)  # fmt: skip


@pytest.fixture(scope="module")
def model(demo, tokenizer):
    """A function of (seed, what it differs by from the one of seed 0): a checkpoint in memory."""
    config = resolve_preset("demo", vocab_size=tokenizer.vocab_size, eot_token_id=tokenizer.eot_token_id, **TINY)

    def made(seed: int, difference: float = 1.0, logit_scale: float = 10.0, bias: float | None = None, **other):
        weights = []
        for of in (0, seed):
            torch.manual_seed(of)
            weights.append(Clip(replace(config, **other)).state_dict())
        mixed = {name: (1 - difference) * x + difference * weights[1][name] for name, x in weights[0].items()}
        return Checkpoint(
            demo / f"model{seed}", replace(config, **other), mixed, logit_scale, demo / "tokenizer", 5, 50, {}, bias
        )

    return made


def test_an_average_is_that_of_float64(model):
    models, shares = [model(i, logit_scale=2.0**i, bias=-float(i)) for i in range(3)], [0.5, 0.3, 0.2]
    found = combine(models, shares)
    for name, x in found.state_dict.items():
        expected = sum(share * m.state_dict[name].double() for share, m in zip(shares, models, strict=True))
        assert torch.equal(x, expected.float()), name
    assert math.log2(found.logit_scale) == pytest.approx(0.3 + 0.4) and found.logit_bias == pytest.approx(-0.7)


def test_models_that_differ_in_more_than_weights_are_refused_by_name(model, tmp_path):
    with pytest.raises(UserError, match="different models: embed_dim 16 and 24"):
        combine([model(0), model(1, embed_dim=24)], [0.5, 0.5])
    with pytest.raises(UserError, match="bias of a sigmoid loss, and the other none"):
        combine([model(0), model(1, bias=-10.0)], [0.5, 0.5])


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_greedy_takes_each_model_that_does_not_lower_the_score_from_the_best_downwards(alone, rng):
    """Against the recipe in the paper's words, on any table of scores."""
    table: dict[frozenset, float] = {frozenset([i]): score for i, score in enumerate(alone)}

    def score(chosen):
        return table.setdefault(frozenset(chosen), rng.randint(0, 8))

    chosen, best = greedy(alone, score)
    ingredients: list[int] = []
    for i in sorted(range(len(alone)), key=lambda i: (-alone[i], i)):
        if not ingredients or score([*ingredients, i]) >= score(ingredients):
            ingredients.append(i)
    assert chosen == ingredients and best == score(chosen) >= max(alone)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(0, 1), st.sampled_from([0, 3]))
def test_the_largest_changes_are_kept_and_as_many_as_asked_for(seed, keep, decimals):
    """Also among equal ones: rounded to 3 decimals many changes are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": (7, 11), "b": (40,), "c": (3, 3, 3)}
    base, tuned = ({n: torch.randn(s, generator=generator) for n, s in sizes.items()} for _ in range(2))
    if decimals:
        base, tuned = ({n: x.round(decimals=1) for n, x in w.items()} for w in (base, tuned))
    as_models = (Checkpoint(None, None, w, 1.0, None, 0, 0, {}) for w in (base, tuned))
    found, parameters = largest_changes(*as_models, keep)
    changes = torch.cat([(tuned[n] - base[n]).flatten() for n in sizes])
    kept = torch.cat([found[n + VALUES] for n in sizes if n + VALUES in found] or [torch.zeros(0)])
    assert parameters == len(changes) == 144 and len(kept) == round(keep * 144)
    expected = changes.abs().sort(descending=True).values[: len(kept)]
    torch.testing.assert_close(kept.abs().sort(descending=True).values, expected, rtol=0, atol=0)


def test_a_whole_difference_gives_the_fine_tune_back_and_two_add_up(model, tmp_path):
    base, one, two = model(0), model(1, 0.01, logit_scale=20.0), model(2, 0.01)
    whole = write_difference(tmp_path / "whole", base, one, 1.0)
    back = compose(base, [whole], [1.0])
    assert back.logit_scale == pytest.approx(20.0)
    for name, x in back.state_dict.items():
        torch.testing.assert_close(x, one.state_dict[name], rtol=1e-6, atol=1e-8)
    parts = [write_difference(tmp_path / f"{k}", base, m, 0.1) for k, m in enumerate((one, two))]
    both = compose(base, parts, [1.0, 0.5])
    for name, x in both.state_dict.items():
        expected = base.state_dict[name].double().flatten()
        for part, share in zip(parts, (1.0, 0.5), strict=True):
            for place, value in zip(part.places.get(name, []), part.values.get(name, []), strict=True):
                expected[place] += share * value.double()
        assert torch.equal(x.flatten(), expected.float()), name
    with pytest.raises(UserError, match="taken from other weights than"):
        compose(two, parts, [1.0, 1.0])


def test_a_file_that_is_no_difference_is_refused(tmp_path):
    (tmp_path / "x").write_text("nothing")
    for path in (tmp_path / "x", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"is no difference that tools/compose\.py wrote"):
            read_difference(path)


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Three models on the disk, two of them near the first."""
    folder = tmp_path_factory.mktemp("models")
    for seed, difference in ((0, 1.0), (1, 0.02), (2, 0.6)):
        export_dsclip(model(seed, difference), folder / str(seed))
    return [str(folder / str(i)) for i in range(3)]


def tool(name, *arguments):
    done = run_program(f"tools/{name}.py", *arguments, "--json")
    return json.loads(done.stdout), done.returncode


def test_soups_are_written_and_measured(folders, tmp_path):
    measured = ["--task", "retrieval", "--data", "demo:val", "--max-samples", "60"]
    found, code = tool("soup", *folders, "--out", tmp_path / "greedy", "--greedy", *measured)
    assert code == 0 and found["score"] >= max(found["alone"]) and len(found["alone"]) == 3
    done = run_program("launchers/evaluate.py", "--model", tmp_path / "greedy", *measured, "--json")
    metrics = json.loads(done.stdout)["metrics"]
    recalls = [metrics[f"{way}_recall@1"] for way in ("image_to_text", "text_to_image")]
    assert sum(recalls) / 2 == found["score"], "the folder is the model that was measured"
    line, code = tool("soup", *folders[:2], "--out", tmp_path / "line", "--interpolate", 3, *measured)
    assert code == 0 and line["score"] == max(point["score"] for point in line["measured"])
    assert {tuple(point["shares"]) for point in line["measured"]} == {(1, 0), (0.5, 0.5), (0, 1)}
    equal, code = tool("soup", *folders[:2], "--out", tmp_path / "equal")
    assert code == 0 and equal["shares"] == [0.5, 0.5] and equal["score"] is None
    weights = [read_checkpoint(path).state_dict for path in (*folders[:2], tmp_path / "equal")]
    for name in weights[0]:
        torch.testing.assert_close(weights[2][name], (weights[0][name] + weights[1][name]) / 2)


def test_differences_are_taken_and_added_by_command(folders, tmp_path):
    base, tuned = folders[:2]
    taken, code = tool("compose", base, "--from", tuned, "--keep", "0.1", "--out", tmp_path / "new" / "d.safetensors")
    assert code == 0 and taken["kept"] == round(0.1 * taken["parameters"])
    added, code = tool("compose", base, "--add", tmp_path / "new" / "d.safetensors", "--out", tmp_path / "both")
    assert code == 0 and added["changed"] == taken["kept"]
    twice, code = tool("compose", base, "--add", *[tmp_path / "new" / "d.safetensors"] * 2, "--out", tmp_path / "twice")
    assert code == 2 and twice["error"].startswith("--add names a file twice")
    one, two = read_checkpoint(base).state_dict, read_checkpoint(tmp_path / "both").state_dict
    assert sum(int((one[n] != two[n]).sum()) for n in one) == taken["kept"]


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("soup", ["{0}"], "one model is no soup"),
        ("soup", ["{0}", "{1}", "--greedy"], "--greedy needs --data"),
        ("soup", ["{0}", "{1}", "--shares", "1"], "--shares has 1 numbers for 2 models"),
        ("soup", ["{0}", "{1}", "{2}", "--interpolate", "3", "--data", "demo:val"], "--interpolate needs two models"),
        ("soup", ["{0}", "{1}", "--shares", "1", "1"], "--shares add up to 2"),
        ("soup", ["{0}", "{1}", "--shares", "nan", "1"], "--shares nan 1.0: every share must be a finite number"),
        ("soup", ["{0}", "{1}", "--max-samples", "5"], "--max-samples belongs to --data"),
        ("compose", ["{0}", "--from", "{1}", "--keep", "2"], "--keep is 2.0"),
        ("compose", ["{0}", "--from", "{1}", "--keep", "1e-12"], "{1} differs from {0} in nothing that would be kept"),
        ("compose", ["{0}", "--from", "{0}"], "{0} differs from {0} in nothing that would be kept"),
        ("compose", ["{0}", "--from", "{1}", "--shares", "2"], "--shares belongs to --add"),
    ],
)
def test_what_can_not_be_is_said_in_one_line(folders, tmp_path, name, arguments, message):
    found, code = tool(name, *(a.format(*folders) for a in arguments), "--out", tmp_path / "out")
    assert code == 2 and found["error"].startswith(message.format(*folders)) and not (tmp_path / "out").exists()
