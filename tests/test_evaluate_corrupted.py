"""Tasks on corrupted pictures: as if the set were corrupted, for any ranks and batches, with features kept apart, in files and suites."""

import json

import pytest
import torch

from dsclip.data import build_eval_dataset
from dsclip.data.corruptions.corruption import Corruption, parse_corruptions
from dsclip.distributed import Collectives
from dsclip.errors import UserError
from dsclip.evaluate import Embedder, cli, run_task
from dsclip.evaluate.feature_cache import FeatureCache
from dsclip.evaluate.results.record import read_result
from dsclip.evaluate.results.result import Outcomes
from dsclip.evaluate.suites.suite import load_suite
from dsclip.evaluate.tasks.corrupted import Corrupted, mean_of
from dsclip.evaluate.tasks.registry import measure_task, prepare_task
from dsclip.losses import SingleRank
from tests.test_data_evaluation_dataset import OPTIONS, encode_text, tokenize, write
from tests.test_evaluate_cli import model, sets  # noqa: F401
from tests.thread_ranks import ThreadRanks

SOME = parse_corruptions(["gaussian_noise:1", "gaussian_noise:5", "contrast:4", "fog:0"])


def encode_image(images):
    """Features that small changes of pixels show in."""
    waves = (images.flatten(1).float() / 5).sin()
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(waves @ torch.randn(waves.shape[1], 8, generator=generator), dim=1)


def embedder(group, store=None, batch_size=3):
    return Embedder(encode_image, encode_text, tokenize, group, store=store, **OPTIONS | {"batch_size": batch_size})


def measured(group, spec, task="zeroshot", corruptions=SOME, **options):
    dataset = build_eval_dataset(str(spec), image_size=16)
    return measure_task(Corrupted(prepare_task(task, dataset), corruptions), embedder(group, **options)), dataset


@pytest.mark.parametrize("task", ["zeroshot", "retrieval"])
def test_metrics_are_those_of_corrupted_sets_and_their_means(task, tmp_path):
    write(tmp_path / "set", broken=(3,))
    found, dataset = measured(SingleRank(), tmp_path / "set", task)
    metrics = found.metrics
    alone = [run_task(task, embedder(SingleRank()), dataset.corrupted(c)).metrics for c in SOME]
    clean = run_task(task, embedder(SingleRank()), dataset).metrics
    main = next(iter(clean))
    assert {name: metrics[name] for name in clean} == clean and dict(dataset.bad) == {"undecodable image": 1}
    for corruption, of_corrupted in zip(SOME, alone, strict=True):
        assert metrics[f"{main}_{corruption.name}_{corruption.severity}"] == of_corrupted[main]
    noise = (alone[0][main] + alone[1][main]) / 2
    assert metrics[f"{main}_gaussian_noise"] == pytest.approx(noise) and f"{main}_contrast" not in metrics
    for name in found.outcomes.keys() & clean.keys():
        mean = ((alone[0][name] + alone[1][name]) / 2 + alone[2][name]) / 2
        assert metrics[f"{name}_corrupted"] == pytest.approx(mean)
    assert metrics[f"{main}_retained"] == pytest.approx(metrics[f"{main}_corrupted"] / clean[main])
    assert any(a != clean for a in alone[:3])


def test_ranks_and_batches_change_nothing(tmp_path):
    write(tmp_path / "set", broken=(3,))
    alone, _ = measured(SingleRank(), tmp_path / "set", batch_size=5)
    for found, dataset in ThreadRanks(2).run(lambda group: measured(group, tmp_path / "set")):
        assert found.metrics == alone.metrics and dict(dataset.bad) == {"undecodable image": 1}


def test_cached_features_are_kept_apart_by_corruption(tmp_path):
    write(tmp_path / "set")
    caches = [FeatureCache("weights", Collectives(0, 1), tmp_path / "cache") for _ in range(3)]
    first, _ = measured(SingleRank(), tmp_path / "set", store=caches[0])
    assert caches[0].found == 0
    again, _ = measured(SingleRank(), tmp_path / "set", store=caches[1])
    assert caches[1].found == 2 + len(SOME) and again.metrics == first.metrics
    other = [Corruption(c.name, c.severity, seed=1) for c in SOME]
    measured(SingleRank(), tmp_path / "set", corruptions=other, store=caches[2])
    assert caches[2].found == 2, "clean images and texts alone"


def test_a_mean_that_is_no_mean_of_samples_has_no_values():
    values, units = torch.tensor([0.0, 1.0, 1.0]), torch.arange(3)
    groups = torch.tensor([0, 0, 1])
    pair = [Outcomes(values, units), Outcomes(1 - values, units)]
    assert mean_of(pair).values.tolist() == [0.5] * 3
    worst = [Outcomes(v, units, "worst_group", groups) for v in (values, 1 - values)]
    assert mean_of(worst) == pytest.approx((0.5 + 0) / 2)
    assert mean_of([pair[0], Outcomes(values, units + 1)]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("task", ["zeroshot", "multilabel", "winoground", "knn"])
def test_the_command_line_writes_what_it_measured(task, model, sets, tmp_path):  # noqa: F811
    options = ["--model", str(model), "--task", task, *sets[task], "--output", str(tmp_path / "a.json")]
    found = cli.evaluate(cli._parser().parse_args([*options, "--corruption", "pixelate", "contrast:5"]))
    main = next(iter(found["metrics"]))
    expected = {f"{main}_pixelate_{s}" for s in range(1, 6)} | {
        f"{main}_contrast_5",
        f"{main}_pixelate",
        f"{main}_corrupted",
    }
    assert expected <= found["metrics"].keys()
    record = read_result(tmp_path / "a.json")
    assert f"{main}_contrast_5" in record.outcomes
    protocol = record.result["protocol"]
    assert protocol["task"]["corruptions"] == [*(f"pixelate:{s}" for s in range(1, 6)), "contrast:5"]
    plain = cli.evaluate(cli._parser().parse_args(options))
    assert plain["protocol"]["data"] == protocol["data"], "the set is the same"
    assert plain["metrics"].items() <= found["metrics"].items()


def test_probes_learn_from_clean_pictures(model, sets, tmp_path):  # noqa: F811
    asked = []
    dataset = build_eval_dataset(sets["knn"][1], image_size=64)
    train = build_eval_dataset(sets["knn"][1], image_size=64, split="train")
    from dsclip.evaluate import Options

    task = Corrupted(prepare_task("knn", dataset, Options(train=train, neighbours=3)), parse_corruptions(["fog:2"]))
    asked = [(part.dataset is train, part.dataset.corruption) for part in task.images]
    assert asked == [(True, None), (False, None), (False, Corruption("fog", 2))]


def test_entries_of_suites_name_corruptions(tmp_path):
    def suite(corruption):
        text = f"entries: [{{name: a, task: zeroshot, data: x, corruption: {corruption}, main: top1_corrupted}}]"
        (tmp_path / "suite.yaml").write_text(text)
        return load_suite(str(tmp_path / "suite.yaml"))

    assert suite("[fog:1, contrast]").entries[0].corruptions == parse_corruptions(["fog:1", "contrast"])
    for wrong in ("fogg", "[3]"):
        with pytest.raises(UserError, match="suite.yaml, entry 1: (there is no corruption|`corruption` is)"):
            suite(wrong)


def test_a_suite_measures_corrupted_entries_and_keeps_them(model, sets, tmp_path, monkeypatch):  # noqa: F811
    data = sets["retrieval"][1]
    (tmp_path / "suite.yaml").write_text(
        f"entries:\n- {{name: a, task: retrieval, data: {data}, corruption: 'fog:4', main: image_to_text_recall@1_fog_4}}\n"
        f"- {{name: b, task: retrieval, data: {data}}}\n"
    )
    monkeypatch.setenv("DSCLIP_CACHE", str(tmp_path / "cache"))
    options = ["--model", str(model), "--suite", str(tmp_path / "suite.yaml"), "--output", str(tmp_path / "out")]
    first = cli.evaluate(cli._parser().parse_args(options))
    assert [row["state"] for row in first["entries"]] == ["done", "done"]
    assert first["entries"][0]["value"] == first["entries"][0]["metrics"]["image_to_text_recall@1_fog_4"]
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 3, "clean, corrupted, texts"
    (tmp_path / "suite.yaml").write_text(
        (tmp_path / "suite.yaml").read_text().replace("fog:4", "fog:5").replace("fog_4", "fog_5")
    )
    again = cli.evaluate(cli._parser().parse_args(options))
    assert [row["state"] for row in again["entries"]] == ["done", "kept"]
    with pytest.raises(UserError, match="--corruption can't be given with --suite"):
        cli.evaluate(cli._parser().parse_args([*options, "--corruption", "fog"]))
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["entries"][0]["value"]
        == again["entries"][0]["value"]
    )
