"""One run over changing ranks and ZeRO stages, against the run that changes nothing."""

import json

import pytest
import torch

from dsclip.checkpoint import find_checkpoint, read_checkpoint, read_manifest
from dsclip.checkpoint.fits import check_fits
from dsclip.config.schema import DataSection, ModelSection, Recipe
from dsclip.convert.source import open_source
from dsclip.errors import UserError
from dsclip.model import Clip, ClipConfig
from tests.distributed.exactness_worker import relative
from tests.distributed.launch import WORKERS, run_ranks
from tests.distributed.resharding_worker import CASES, HEADS

CHAIN = ((2, 3), (1, 1), (4, 2), (2, 3), (2, 1))  # ranks, ZeRO stage; two steps each


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{case: [launches]} of the chain, losses of the undisturbed run {case: [loss]}, and the two folders."""
    folder = tmp_path_factory.mktemp("resharding")
    chain = {name: [] for name in CASES}

    def launch(ranks: int, to: str, **settings) -> list[dict]:
        results = folder / "results.json"
        run_ranks(WORKERS / "resharding_worker.py", ranks, results, folder / to, json.dumps(settings))
        return json.loads(results.read_text())

    for index, (ranks, stage) in enumerate(CHAIN):
        for result in launch(ranks, "chain", stage=stage, stop=2 * index + 2):
            chain[result["name"]].append(result)
    plain = {r["name"]: r["losses"] for r in launch(2, "plain", stage=3, stop=2 * len(CHAIN))}
    return chain, plain, folder


@pytest.mark.parametrize("name", CASES)
def test_weights_and_their_average_arrive_bit_for_bit(name, runs):
    found = [launch["found"] for launch in runs[0][name]]
    assert found == [{}] + [{"weights": True, "average": True}] * (len(CHAIN) - 1)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_run_that_changed_nothing(name, runs):
    ours, expected = [x for launch in runs[0][name] for x in launch["losses"]], runs[1][name]
    assert len(ours) == len(expected) == 2 * len(CHAIN)
    assert ours == pytest.approx(expected, rel=1e-5 if "fp32" in name else 2e-2)


@pytest.mark.parametrize("name", [n for n in CASES if "fp32" in n])
def test_the_optimizer_goes_on_with_its_state(name, runs):
    """Moments that were lost or misplaced would move the weights elsewhere."""
    ours, expected = (torch.load(runs[2] / run / name / "whole.pt")["weights"] for run in ("chain", "plain"))
    assert relative(ours, expected) < 1e-4


@pytest.mark.parametrize("average", [False, True])
def test_a_checkpoint_is_read_without_its_heads(average, runs):
    """By its weights alone, and by their average."""
    folder = runs[2] / "chain" / "muon-fp32"
    read, whole = read_checkpoint(folder, average=average), torch.load(folder / "whole.pt")
    of_heads = {name for name in whole["weights"] if ".head.named." in name}
    assert len(of_heads) == 8 and read.heads == ("pixels", "words")
    assert set(read.state_dict) == set(Clip(read.config).state_dict()) == set(whole["weights"]) - of_heads
    expected = whole["average" if average else "weights"]["text.head.projection.weight"]
    assert torch.equal(read.state_dict["text.head.projection.weight"].flatten(), expected.flatten())
    (note,) = open_source(folder, average=average).notes(read.config)
    assert "was trained with the heads pixels, words, which are left out" in note


def test_what_cannot_be_placed_anew_is_refused_in_one_line(runs):
    path = find_checkpoint(runs[2] / "plain" / "adamw-fp32")
    manifest = read_manifest(path)
    settings = dict(ds_config={"zero_optimization": {"stage": 3}}, config=ClipConfig(**manifest["model"]), world_size=4)
    with pytest.raises(UserError, match="a position in the data belongs to a number of ranks"):
        check_fits(manifest, path, recipe=Recipe(data=DataSection(order="stream")), **settings)
    with pytest.raises(UserError, match=r'was trained with the heads \[\] and this run has \[\{"name": "pixels"'):
        check_fits(
            manifest,
            path,
            recipe=Recipe(model=ModelSection(lock="image", unlocked_layers=1), objective=HEADS),
            **settings,
        )
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if "layout" not in name}
    with pytest.raises(UserError, match="was written by 2 ranks with ZeRO-3 and this run has 4 ranks with ZeRO-3"):
        check_fits(manifest, path, recipe=Recipe(), **settings)
