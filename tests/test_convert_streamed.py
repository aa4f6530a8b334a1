"""Models that are read and run a piece at a time give what whole ones give, in files and in numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPModel

from dsclip.convert import cli, export_hf, load_hf_folder
from dsclip.convert.compare import difference_in_transformers
from dsclip.convert.hf_folder import open_hf_folder
from dsclip.convert.streamed import loaded_clip, spread_clip
from dsclip.errors import UserError
from dsclip.evaluate.cli import main as evaluate_command
from tests.test_convert import checkpoint_of, inputs, perturbed, small

FP32 = torch.float32


@pytest.fixture(scope="module")
def model():
    return perturbed(small("demo"))


@pytest.fixture(scope="module")
def folder(model, demo, tmp_path_factory) -> Path:
    """The model in files of 100 kB."""
    out = tmp_path_factory.mktemp("convert") / "hf"
    export_hf(checkpoint_of(model, demo), out, max_shard_gb=1e-4)
    return out


def test_a_model_in_many_files_is_read_by_transformers_and_by_dsclip(model, folder):
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and not list(folder.glob("*.tmp"))
    largest = max(p.nbytes for p in CLIPModel.from_pretrained(folder).parameters())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in files:
        with safe_open(file, "pt") as stored:
            names = list(stored.keys())
            assert sum(stored.get_tensor(n).nbytes for n in names) <= max(100_000, largest)
        assert all(index["weight_map"][n] == file.name for n in names)
    config, weights, _ = load_hf_folder(folder)
    assert config == model.config
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())


@torch.no_grad()
def test_layers_on_the_disk_compute_bit_for_bit_the_same(model, folder, tmp_path):
    source, (images, tokens) = open_hf_folder(folder), inputs(model.config)
    whole = loaded_clip(source.config, source.weights.items(), torch.device("cpu"), FP32)
    spread, parts = spread_clip(source.config, source.weights.items(), FP32, tmp_path, host_gb=2e-3)
    assert set(parts.values()) == {"disk", "cpu"}
    for _ in range(2):  # a layer is fetched again each time
        for ours, theirs in zip(spread(images, tokens), whole(images, tokens), strict=True):
            assert torch.equal(ours, theirs)
    on_disk = {n for n, p in spread.named_parameters() if p.device.type == "meta"}
    assert on_disk and {f"{n}.dat" for n in on_disk} == {p.name for p in tmp_path.glob("*.dat")}


def test_the_comparison_with_transformers_sees_a_wrong_weight(model, folder, demo):
    assert difference_in_transformers(checkpoint_of(model, demo), folder) <= 1e-5
    other = perturbed(small("demo"))
    with torch.no_grad():
        other.text.blocks[1].mlp.fc2.weight.mul_(1.1)
    assert difference_in_transformers(checkpoint_of(other, demo), folder) > 1e-4


@pytest.mark.parametrize(
    "change, message", [("lacks", "the weights lack"), ("shape", "has the shape"), ("more", "hasn't")]
)
def test_weights_that_do_not_fit_are_named(change, message, model):
    weights = dict(model.state_dict())
    if change == "lacks":
        del weights["text.head.ln_final.bias"]
    elif change == "shape":
        weights["text.head.ln_final.bias"] = torch.zeros(3)
    else:
        weights["text.head.other"] = torch.zeros(3)
    with pytest.raises(UserError, match=message):
        loaded_clip(model.config, weights.items(), torch.device("cpu"), FP32)


def test_evaluation_from_disk_gives_the_same_metrics(folder, tmp_path, capsys):
    results = []
    offload = tmp_path / "offload"
    spread = ["--device-map", "auto", "--host-memory-gb", "2e-3", "--offload-folder", str(offload)]
    for options in ([], spread):
        evaluate_command(
            [
                "--model",
                str(folder),
                "--task",
                "zeroshot",
                "--data",
                "demo:val",
                "--max-samples",
                "80",
                "--json",
                *options,
            ]
        )
        out, err = capsys.readouterr()
        results.append(json.loads(out))
    assert results[0] == results[1] and results[0]["metrics"]["samples"] > 0
    assert "on disk" in err and list(offload.glob("*.dat"))


@pytest.mark.parametrize("size", ["0.0", "-1.0", "nan", "inf"])
def test_a_shard_size_that_is_none_is_refused(size, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(tmp_path), str(tmp_path / "out"), f"--max-shard-gb={size}"], to="hf")
    assert ended.value.code == 2 and f"--max-shard-gb is {size}; it must be" in capsys.readouterr().err
