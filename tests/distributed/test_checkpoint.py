"""Checkpoints of every ZeRO stage on two ranks: exact continuation, whole weights, refusal of damaged ones."""

import json
import os
import shutil

import pytest
import torch

from dsclip.checkpoint import complete_checkpoints, find_checkpoint, read_checkpoint
from dsclip.checkpoint.manifest import MANIFEST, sha256
from dsclip.errors import UserError
from tests.distributed.launch import WORKERS, run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(WORKERS / "checkpoint_worker.py", 2, folder / "results.json", folder)
    return folder


@pytest.fixture(scope="module")
def results(saved):
    return json.loads((saved / "results.json").read_text())


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(find_checkpoint(saved / "3-True"), tmp_path / "step_00000008")


def test_resumed_losses_are_bit_identical(results):
    assert len(results) == 8
    for result in results:
        assert len(result["expected"]) == 6
        assert result["seen"] == result["expected"], f"ZeRO-{result['stage']}, bf16 {result['bf16']}"
        assert result["again"] == result["expected"][3:], "loaded into an engine that has trained on"
    assert [r["undisturbed"] == r["expected"] for r in results if "undisturbed" in r] == [True], "saving changes it"


def test_a_checkpoint_that_is_written_in_the_background_has_the_files_of_one_that_is_written_at_once(results):
    assert all(result["same_files"] for result in results)
    assert any(result["under_way"] for result in results), "none was under way after it was copied"


def test_the_queue_and_its_momentum_encoder_change_the_loss_once_they_are_used(results):
    plain, queue = (
        next(r["expected"] for r in results if r["stage"] == 3 and r["bf16"] and bool(r["queue"]) is used)
        for used in (False, True)
    )
    assert plain[:2] == queue[:2] and all(p != q for p, q in zip(plain[2:], queue[2:], strict=True))


def test_each_rank_gets_its_own_data_state_back(results):
    assert all(r["data"] == [{"position": 0}, {"position": 1}] for r in results)


def test_read_checkpoint_returns_the_float32_master_weights(results):
    assert all(r["weights_equal"] and r["names_equal"] and r["scale_equal"] for r in results)


def test_only_the_last_k_checkpoints_are_kept(results):
    assert [r["kept"] for r in results if "kept" in r] == [["step_00000007", "step_00000008"]]


def test_half_written_checkpoints_are_never_chosen(saved, tmp_path):
    folder = shutil.copytree(saved / "3-True" / "checkpoints", tmp_path / "checkpoints")
    (folder / "step_00000008" / MANIFEST).unlink()
    (folder / "step_00000009.tmp").mkdir()
    assert [p.name for p in complete_checkpoints(folder)] == ["step_00000007"]
    assert find_checkpoint(tmp_path).name == "step_00000007"


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_poisoned_file_is_refused_unopened(checkpoint, tmp_path):
    victim = next(checkpoint.glob("deepspeed/*rank_0*model_states.pt"))
    torch.save({"module": Payload(tmp_path / "executed")}, victim)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    name = victim.relative_to(checkpoint).as_posix()
    manifest["files"][name] = {"bytes": victim.stat().st_size, "sha256": sha256(victim)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="would run code when loaded: it refers to posix.mkdir"):
        read_checkpoint(checkpoint)
    assert not (tmp_path / "executed").exists()
