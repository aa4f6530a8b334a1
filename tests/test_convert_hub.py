"""Folders go to the HuggingFace hub and come back: a server of this process speaks its HTTP, huggingface_hub is the real one."""

import json

import pytest
from huggingface_hub import constants
from transformers import CLIPModel

from dsclip.convert import cli, export_hf
from tests.hub_server import Hub
from tests.test_convert import checkpoint_of, differences, perturbed, small


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
        ("no token", "there is no token"),
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
        monkeypatch.setenv("HF_TOKEN", "" if case == "no token" else "hf_wrong")
    error = convert(capsys, folder, tmp_path / "out", "--push", "me/clip", code=2)["error"]
    assert reason in error and "was not pushed to me/clip" in error and "hf upload me/clip" in error
    assert "\n" not in error and "Traceback" not in error
    CLIPModel.from_pretrained(tmp_path / "out")


def test_a_wrong_name_is_found_before_anything_is_written(folder, tmp_path, capsys):
    error = convert(capsys, folder, tmp_path / "out", "--push", "a/b/c", code=2)["error"]
    assert "a/b/c is no name of a repository" in error and not (tmp_path / "out").exists()
