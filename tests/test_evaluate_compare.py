"""Results on disk, their protocol, and which of their differences are more than chance."""

import json

import pytest
import torch

from dsclip.create import create_model
from dsclip.data import build_eval_dataset, load_tokenizer
from dsclip.errors import UserError
from dsclip.evaluate import Measured, Options, Outcomes, prepare_task, with_intervals
from dsclip.evaluate.results.compare import compare, differing, p_value
from dsclip.evaluate.results.compare_cli import main
from dsclip.evaluate.results.intervals import bootstrap
from dsclip.evaluate.results.protocol import run_protocol, task_protocol, weights_sha256
from dsclip.evaluate.results.record import read_result, write_result

PROTOCOL = {
    "task": {"templates_sha256": "t"},
    "data": {"samples": 400, "texts_sha256": "d", "name": "here"},
    "text": {"tokenizer": "a"},
}


def write(path, hits, groups=None, **protocol):
    outcomes = {"top1": Outcomes(hits.float(), torch.arange(len(hits)))}
    if groups is not None:
        outcomes["mean_per_class_recall"] = Outcomes(hits.float(), torch.arange(len(hits)), "mean_of_groups", groups)
    measured = Measured(outcomes, {"samples": len(hits)})
    result = {
        "task": "zeroshot",
        "metrics": with_intervals(measured),
        "model": path.stem,
        "protocol": PROTOCOL | protocol,
    }
    write_result(path, result, measured)
    return path


def test_a_result_comes_back_from_its_files(tmp_path):
    hits, groups = torch.rand(50) < 0.5, torch.arange(50) % 3
    record = read_result(write(tmp_path / "a.json", hits, groups))
    assert record.outcomes["top1"].values.tolist() == hits.tolist()
    mean = record.outcomes["mean_per_class_recall"]
    assert mean.reduction == "mean_of_groups" and mean.groups.tolist() == groups.tolist()
    assert mean.value() == record.result["metrics"]["mean_per_class_recall"]
    (tmp_path / "a.values.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="damaged"):
        read_result(tmp_path / "a.json")
    (tmp_path / "a.values.safetensors").unlink()
    with pytest.raises(UserError, match="a.values.safetensors is missing"):
        read_result(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(UserError, match="no result with a protocol"):
        read_result(tmp_path / "b.json")


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact test of paired hits: a fair coin for each sample on which only one is right."""
    n, k = only_first + only_second, min(only_first, only_second)
    chances = (
        torch.distributions.Binomial(n, torch.tensor(0.5, dtype=torch.float64))
        .log_prob(torch.arange(k + 1).double())
        .exp()
    )
    return min(1.0, 2 * chances.sum().item())


@pytest.mark.parametrize("worse, better", [(10, 30), (20, 24), (12, 25), (0, 0), (30, 10)])
def test_the_paired_bootstrap_says_what_mcnemars_test_says(tmp_path, worse, better):
    first = torch.zeros(400, dtype=torch.bool)
    first[:200] = True
    second = first.clone()
    second[:worse] = False
    second[200 : 200 + better] = True
    row = compare([read_result(write(tmp_path / "a.json", first)), read_result(write(tmp_path / "b.json", second))])[0]
    found = row.differences[0]
    assert row.values == [0.5, 0.5 + (better - worse) / 400] and found.difference == pytest.approx(
        (better - worse) / 400
    )
    assert found.p == pytest.approx(mcnemar(worse, better), abs=0.02 if mcnemar(worse, better) < 0.1 else 0.15)
    spread = ((better + worse) / 400 - ((better - worse) / 400) ** 2) ** 0.5 / 20  # of a mean of -1, 0 and 1
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * 1.96 * spread, rel=0.1, abs=1e-9)


def test_models_that_are_equal_seldom_look_different():
    """200 pairs of models that are right on the same share of samples: about 5% of differences are called significant."""
    generator, called = torch.Generator().manual_seed(5), 0
    for _ in range(200):
        a, b = (torch.rand(300, generator=generator) < 0.6 for _ in range(2))
        both = [Outcomes(x.float(), torch.arange(300)) for x in (a, b)]

        drawn = bootstrap(both)
        called += p_value(drawn[1] - drawn[0]) < 0.05
    assert called <= 22


def test_differences_of_protocol_are_named(tmp_path, capsys):
    hits = torch.arange(40) % 2 == 0
    a = write(tmp_path / "a.json", hits)
    b = write(tmp_path / "b.json", ~hits, text={"tokenizer": "b"}, data=PROTOCOL["data"] | {"name": "elsewhere"})
    c = write(tmp_path / "c.json", hits, task={"templates_sha256": "u"})
    assert differing([read_result(a), read_result(b)]) == ({}, {"text.tokenizer": ["a", "b"]})
    assert main([str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert "differs: text.tokenizer: a / b" in shown and "| top1 | 50.00% | 50.00% | +0.00 (" in shown
    assert main([str(a), str(c)]) == 2
    assert "task.templates_sha256: t against u. --despite task.templates_sha256" in capsys.readouterr().err
    assert main([str(a), str(c), "--despite", "task.templates_sha256", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["protocol_differences"] == {"task.templates_sha256": ["t", "u"]}
    assert found["metrics"]["top1"]["against_the_first"] == [{"difference": 0, "ci95": [0, 0], "p": 1}]
    assert main([str(a), str(b), "--despite", "task.x"]) == 2


def test_results_of_other_samples_are_refused(tmp_path):
    a, b = write(tmp_path / "a.json", torch.ones(40) > 0), write(tmp_path / "b.json", torch.ones(41) > 0)
    with pytest.raises(UserError, match="not of the same samples"):
        compare([read_result(a), read_result(b)])


def test_the_protocol_tells_prompts_texts_weights_and_tokenizers_apart(demo):
    dataset = build_eval_dataset("demo:val", image_size=64, max_samples=12)
    one = task_protocol(prepare_task("zeroshot", dataset, Options(templates=["a {}."])))
    other = task_protocol(prepare_task("zeroshot", dataset, Options(templates=["the {}."])))
    assert one["data"] == other["data"] and one["data"]["samples"] == 6
    assert {k for k in one["task"] if one["task"][k] != other["task"][k]} == {"templates_sha256"}
    dataset.captions[0] = ["something else"]
    retrieval = task_protocol(prepare_task("retrieval", dataset))["data"]["texts_sha256"]
    fresh = build_eval_dataset("demo:val", image_size=64, max_samples=12)
    assert task_protocol(prepare_task("retrieval", fresh))["data"]["texts_sha256"] != retrieval

    tokenizer = load_tokenizer("demo")
    model = create_model("demo", vocab_size=tokenizer.vocab_size, eot_token_id=tokenizer.eot_token_id)
    before = tokenizer.sha256()
    tokenizer(["two words"], 8)
    assert tokenizer.sha256() == before
    record = run_protocol(model, "m", model.config, tokenizer, "demo", torch.float32, torch.device("cpu"))
    assert json.loads(json.dumps(record)) == record and record["precision"]["dtype"] == "float32"
    assert record["image"]["size"] == model.config.image_size and record["versions"]["torch"] == torch.__version__
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1
    assert weights_sha256(model) != record["model"]["weights_sha256"]
    assert weights_sha256(model.to("meta")) is None


def test_suites_are_compared_entry_by_entry(tmp_path, capsys):
    hits = torch.arange(40) % 2 == 0

    def suite(name, entries):
        (tmp_path / name / "entries").mkdir(parents=True)
        rows = [{"name": "absent", "state": "missing"}]
        for entry, values in entries.items():
            write(
                tmp_path / name / "entries" / f"{entry}-{name}.json",
                values,
                task={"templates_sha256": values.sum().item() if entry == "c" else 0},
            )
            rows.append({"name": entry, "state": "done", "file": f"elsewhere/entries/{entry}-{name}.json"})
        (tmp_path / name / "results.json").write_text(json.dumps({"suite": "s", "entries": rows}))
        return str(tmp_path / name / "results.json")

    one = suite("one", {"a": hits, "b": hits, "c": hits})
    two = suite("two", {"a": ~hits, "c": hits | True})
    assert main([one, two, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["entries"].keys() == {"a"} and found["entries"]["a"]["metrics"]["top1"]["values"] == [0.5, 0.5]
    assert found["not_compared"]["b"] == f"no result in {two}" and "templates_sha256" in found["not_compared"]["c"]
    assert main([one, two]) == 0
    shown = capsys.readouterr().out
    assert "**a**" in shown and f"not compared: b: no result in {two}" in shown
    assert main([one, str(tmp_path / "two" / "entries" / "a-two.json")]) == 2
    assert "some of these are results of suites" in capsys.readouterr().err
