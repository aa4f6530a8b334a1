"""Folders go to the HuggingFace hub and come back: a server of this process speaks its HTTP, huggingface_hub is the real one."""

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants
from transformers import CLIPModel

from dsclip.convert import cli, export_hf
from dsclip.convert.init import starting_tokenizer
from dsclip.convert.openclip_export import export_openclip
from dsclip.convert.source import open_source
from dsclip.create import create_model
from dsclip.data import load_tokenizer
from dsclip.errors import UserError
from dsclip.evaluate.cli import _parser, evaluate
from tests.hub_server import SHA, Hub
from tests.test_convert import checkpoint_of, differences, perturbed, small
from tests.test_train_evaluation import OFF, plan


@pytest.fixture(scope="module")
def model():
    return perturbed(small("demo", activation="quick_gelu", vision_heads=2))


@pytest.fixture(scope="module")
def folder(model, demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("convert") / "hf"
    export_hf(checkpoint_of(model, demo), out)
    return out


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub reads the environment when it is imported: what it read is set here. Xet needs a server of its own."""
    server = Hub()
    settings = dict(
        ENDPOINT=server.address, HUGGINGFACE_CO_URL_TEMPLATE=server.address + "/{repo_id}/resolve/{revision}/{filename}",
        HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True, HF_HUB_CACHE=str(tmp_path / "cache"), HF_TOKEN_PATH=str(tmp_path / "token"),
    )  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    yield server
    server.close()


def convert(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments), "--json"], to="hf")
    assert ended.value.code == code
    return json.loads(capsys.readouterr().out)


def test_a_pushed_folder_is_what_transformers_loads_from_the_hub(model, folder, hub, tmp_path, capsys):
    result = convert(capsys, folder, tmp_path / "out", "--push", "me/clip")
    assert result["pushed"] == f"{hub.address}/me/clip" and hub.private == {"me/clip"}
    written = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert hub.repositories["me/clip"] == written
    assert max(differences(model, CLIPModel.from_pretrained("me/clip"))[:2]) <= 1e-5
    convert(capsys, folder, tmp_path / "again", "--push", "me/clip")  # a repository that is there already
    assert len([path for path in hub.asked if path.endswith("/commit/main")]) == 2


@pytest.mark.parametrize(
    "case, reason",
    [
        ("wrong token", "Invalid username or password (HTTP 401)"),
        ("offline", "offline"),
        ("no server", "refused"),
    ],
)
def test_a_push_that_fails_keeps_the_folder(case, reason, folder, hub, tmp_path, capsys, monkeypatch):
    if case == "no server":
        hub.close()
    elif case == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    error = convert(capsys, folder, tmp_path / "out", "--push", "me/clip", code=2)["error"]
    assert reason in error and "was not pushed to me/clip" in error and "hf upload me/clip" in error
    assert "\n" not in error and "Traceback" not in error
    CLIPModel.from_pretrained(tmp_path / "out")


def test_a_wrong_name_is_found_before_anything_is_written(folder, tmp_path, capsys):
    error = convert(capsys, folder, tmp_path / "out", "--push", "a/b/c", code=2)["error"]
    assert "a/b/c is no name of a repository" in error and not (tmp_path / "out").exists()


def test_a_missing_token_is_found_before_anything_is_written(folder, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    error = convert(capsys, folder, tmp_path / "out", "--push", "me/clip", code=2)["error"]
    assert "there is no token for the hub" in error and "hf auth login" in error and not (tmp_path / "out").exists()


def kept(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def published(folder, model, demo, hub, tmp_path):
    """me/clip in transformers' layout, me/parts in many files, me/both in both layouts, of which OpenCLIP's is another model."""
    checkpoint = checkpoint_of(model, demo)
    export_hf(checkpoint, tmp_path / "parts", max_shard_gb=1e-4)
    other = checkpoint_of(perturbed(small("demo", layer_norm_eps=1e-3)), demo)
    export_openclip(other, tmp_path / "openclip")
    hub.repositories |= {
        "me/clip": kept(folder) | {"pytorch_model.bin": b"pickle", "model.fp16.safetensors": b"not read"},
        "me/parts": kept(tmp_path / "parts"), "me/both": kept(folder) | kept(tmp_path / "openclip"),
        "me/pickled": {k: v for k, v in kept(folder).items() if not k.endswith(".safetensors")},
    }  # fmt: skip
    return other


def same(ours, theirs):
    return all(torch.equal(p, theirs.state_dict()[n]) for n, p in ours.state_dict().items())


def test_models_of_the_hub_come_whole_and_are_kept(model, published, hub, monkeypatch):
    """Configuration, weights, tokenizer; again without the hub; only what is read is loaded."""
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        for name in ("hf:me/clip", "hf:me/parts", "hf:me/both"):
            created = create_model("auto", init=name)
            assert created.config == model.config and same(created, model)
            assert load_tokenizer(starting_tokenizer(name, "auto")).eot_token_id == 611
        created = create_model("auto", init="openclip:me/both")
        assert created.config == published.config and all(
            torch.equal(p, published.state_dict[n]) for n, p in created.state_dict().items()
        )
    loaded = {path.rpartition("/")[2] for path in hub.asked if path.startswith("GET") and "/resolve/" in path}
    assert "model.safetensors" in loaded and not {"pytorch_model.bin", "model.fp16.safetensors"} & loaded


def test_a_revision_is_the_one_that_is_loaded(model, published):
    assert same(create_model("auto", init=f"hf:me/clip@{SHA}"), model)
    with pytest.raises(UserError, match=r"me/clip can't be loaded from the hub"):
        create_model("auto", init="hf:me/clip@no-such-tag")


@pytest.mark.parametrize(
    "name, message",
    [
        ("hf:me/nothing", "me/nothing can't be loaded from the hub: .*HTTP 404"),
        ("hf:me/no/name", "is no name of a repository"),
        ("openclip:me/clip", "the repository has no open_clip_config.json"),
        ("hf:me/pickled", "has no model.safetensors; pickled weights"),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(name, message, published):
    with pytest.raises(UserError, match=message) as error:
        create_model("auto", init=name)
    assert "\n" not in str(error.value)


def test_nothing_kept_and_no_hub_is_one_sentence(published, hub):
    hub.close()
    with pytest.raises(UserError, match="me/clip can't be loaded from the hub"):
        create_model("auto", init="hf:me/clip")


def test_evaluation_and_conversion_take_the_same_names(folder, published, tmp_path, capsys):
    options = ["--task", "zeroshot", "--data", "demo:val", "--max-samples", "8"]
    ours, theirs = (
        evaluate(_parser().parse_args(["--model", str(name), *options]))["metrics"] for name in (folder, "hf:me/clip")
    )
    assert ours == theirs
    convert(capsys, "openclip:me/both", tmp_path / "out")
    assert open_source(tmp_path / "out").config() == published.config


def test_a_run_starts_from_the_hub_with_the_model_as_it_is_there(model, published, tmp_path):
    """Three overrides in place of ten; the run's configuration says what the model was."""
    planned = plan(tmp_path, "model.init=hf:me/clip", "model.preset=auto", "data.tokenizer=auto", *OFF)
    assert planned.model == model.config and planned.tokenizer.eot_token_id == 611
    assert planned.recipe.model.vision_heads == 2 and planned.recipe.model.name == "hf:me/clip"
    larger = plan(tmp_path, "model.init=hf:me/clip", "model.preset=auto", "model.image_size=96", *OFF)
    assert larger.model == replace(model.config, image_size=96)
