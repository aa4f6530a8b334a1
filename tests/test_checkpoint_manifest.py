"""What verification refuses: files that nobody vouched for, manifests that lie, ranks that see different folders."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from dsclip.checkpoint import read_checkpoint
from dsclip.checkpoint.manifest import MANIFEST, content_of, verify, write_manifest
from dsclip.errors import UserError
from dsclip.model import resolve_preset
from dsclip.saving.commit import write_manifest_file

STATE = {
    "step": 3, "samples": 48, "world_size": 1, "zero_stage": 3, "recipe": {}, "data": [{}],
    "engine": {"step": 3, "scalars": {"log_scale": {"value": 2.5}}, "queue": None},
    "model": asdict(resolve_preset("demo")),
}  # fmt: skip


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder laid out as a checkpoint, with a manifest that is true."""
    folder = tmp_path / "step_00000003"
    (folder / "deepspeed").mkdir(parents=True)
    torch.save({"weight": torch.ones(3)}, folder / "deepspeed" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    write_manifest(folder, STATE)
    assert verify(folder)["step"] == 3
    return folder


def change(folder, **values):
    """Writes other values into the manifest; None removes a field."""
    manifest = json.loads((folder / MANIFEST).read_text()) | values
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def refused(folder) -> str:
    with pytest.raises(UserError) as error:
        read_checkpoint(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_flipped_byte_is_named(checkpoint):
    victim = next(checkpoint.glob("deepspeed/*.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match=f"{victim.name} has changed"):
        verify(checkpoint)


def test_a_truncated_and_a_missing_file_are_named(checkpoint):
    victim = checkpoint / "tokenizer" / "tokenizer.json"
    victim.write_bytes(victim.read_bytes()[:-1])
    assert "tokenizer.json has 1 bytes instead of 2" in refused(checkpoint)
    victim.unlink()
    assert "tokenizer.json is missing" in refused(checkpoint)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no dsclip checkpoint"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        read_checkpoint(tmp_path / "nowhere")
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(tmp_path)


def test_a_poisoned_file_that_the_manifest_does_not_list_is_never_opened(checkpoint, tmp_path):
    victim = next(checkpoint.glob("deepspeed/*.pt"))
    torch.save({"module": Payload(tmp_path / "executed")}, victim)
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    del files[victim.relative_to(checkpoint).as_posix()]
    change(checkpoint, files=files)
    assert f"holds deepspeed/{victim.name}, which dsclip.json does not list. Nothing was opened" in refused(checkpoint)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name", ["queue.safetensors", "tokenizer/special_tokens_map.json", "deepspeed/.hidden", "a/b/c"]
)
def test_every_unlisted_file_is_refused(name, checkpoint):
    (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
    (checkpoint / name).write_text("x")
    assert f"holds {name}, which" in refused(checkpoint)


def test_a_folder_that_cannot_be_listed_is_refused(checkpoint, monkeypatch):
    """What stands in it could be loaded by name. Simulated: modes don't bind root."""
    (checkpoint / "hidden").mkdir()
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "hidden":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "hidden can't be listed (Permission denied)" in refused(checkpoint)


def test_links_are_refused(checkpoint, tmp_path):
    victim = next(checkpoint.glob("deepspeed/*.pt"))
    victim.rename(tmp_path / "elsewhere.pt")
    victim.symlink_to(tmp_path / "elsewhere.pt")
    assert f"holds the link deepspeed/{victim.name}" in refused(checkpoint)
    victim.unlink()
    (tmp_path / "elsewhere.pt").rename(victim)
    (checkpoint / "more").symlink_to(tmp_path, target_is_directory=True)
    assert "holds the link more" in refused(checkpoint)


@pytest.mark.parametrize(
    "name", ["../outside.pt", "/etc/passwd", "deepspeed/../../outside.pt", "./x", "a//b", "", ".."]
)
def test_entries_outside_the_folder_are_refused(name, checkpoint):
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    change(checkpoint, files=files | {name: {"bytes": 1, "sha256": "0"}})
    assert "which is no file of the folder" in refused(checkpoint)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"files": None}, "it has no `files`"),
        ({"files": ["a"]}, "its `files` is no dict"),
        ({"files": {"a": 3}}, "its entry for a gives no size and SHA-256"),
        ({"step": "3"}, "its `step` is no int"),
        ({"step": True}, "its `step` is no int"),
        ({"data": None}, "it has no `data`"),
        ({"format": "other"}, "its format is 'other'"),
        ({"engine": {}}, "'scalars'"),
        ({"model": {"layers": 3}}, "layers"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_a_sentence(values, message, checkpoint):
    change(checkpoint, **values)
    assert re.search(r"is damaged \(.*\); use another checkpoint of the run", refused(checkpoint))
    assert message in refused(checkpoint)


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", '{"format": ["x"]}', "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass")]
)
def test_a_manifest_that_is_no_object_is_a_sentence(text, checkpoint):
    (checkpoint / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "is damaged" in refused(checkpoint)


def test_files_that_the_committing_rank_does_not_see_yet_are_in_the_manifest(checkpoint, tmp_path):
    """Over NFS the listings of two nodes differ for a while: what others wrote and hashed is believed."""
    written = json.loads((checkpoint / MANIFEST).read_text())["files"]
    name = next(iter(written))
    (checkpoint / name).rename(tmp_path / "elsewhere")
    (checkpoint / MANIFEST).unlink()
    write_manifest_file(checkpoint, MANIFEST, content_of(STATE), {name: written[name]})
    (tmp_path / "elsewhere").rename(checkpoint / name)
    assert verify(checkpoint)["files"] == written and len(written) == 2
