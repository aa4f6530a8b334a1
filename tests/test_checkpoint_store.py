"""A checkpoint of one rank: what its manifest says, what of it stays, and which engines may continue it."""

import os
import shutil
import signal
from dataclasses import replace

import pytest

from dsclip.checkpoint import (
    CheckpointStore,
    NoRoom,
    NotSaved,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    read_manifest,
)
from dsclip.checkpoint.lineage import Lineage, complete_checkpoints
from dsclip.config.schema import LossSection
from dsclip.convert import load_init
from dsclip.errors import UserError
from dsclip.model.config import OF_THE_RUN
from dsclip.saving import Background
from tests.distributed.checkpoint_worker import NoTokenizer
from tests.distributed.exactness_worker import CONFIG, GLOBAL_BATCH, build, global_batch
from tests.distributed.launch import alone

OPTIONS = dict(micro_batches=1, chunks=1, patch_dropout=0.0, bf16=False)


@pytest.fixture(scope="module")
def group():
    with alone() as group:
        yield group


@pytest.fixture(scope="module")
def saved(group, tmp_path_factory):
    """A run folder with the checkpoints of steps 2 and 3, of which only these were kept, and what 3 was."""
    run = tmp_path_factory.mktemp("run")
    (run / "checkpoints" / "step_00000001.tmp" / "left by another save").mkdir(parents=True)
    engine = build(1, **OPTIONS, group=group)
    store = CheckpointStore(run, keep=2, tokenizer=NoTokenizer(), lineage=Lineage("this"))
    for step in range(3):
        engine.train_step(global_batch(step))
        store.save(engine, {"position": step}, {"train": {"seed": 7}}, {"bad": 2})
    engine.close()
    return run, store


def names(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_newest_are_kept_and_nothing_else_is_left(saved):
    run, store = saved
    assert names(run) == ["step_00000002", "step_00000003"]
    assert find_checkpoint(run) == store.find(3) == run / "checkpoints" / "step_00000003"
    assert find_checkpoint(run / "checkpoints").name == "step_00000003" and store.find(1) is None
    assert [p.name for p in complete_checkpoints(run / "checkpoints")] == names(run)


def test_the_manifest_says_what_the_run_was(saved):
    manifest = read_manifest(find_checkpoint(saved[0]))
    assert (manifest["step"], manifest["samples"]) == (3, 3 * GLOBAL_BATCH)
    assert (manifest["world_size"], manifest["zero_stage"]) == (1, 1)
    assert manifest["lineage"]["steps"] == [1, 2] and manifest["lineage"]["run"] == "this"
    assert (manifest["data"], manifest["recipe"]) == ([{"position": 2}], {"train": {"seed": 7}})
    assert manifest["counters"] == {"bad": 2}


def test_it_is_read_as_one_model(saved):
    found = read_checkpoint(saved[0])
    assert (found.step, found.samples, found.path) == (3, 3 * GLOBAL_BATCH, find_checkpoint(saved[0]))
    assert found.tokenizer_dir == found.path / "tokenizer" and found.tokenizer_dir.is_dir()


def test_a_step_that_is_saved_again_replaces_its_checkpoint(saved, group):
    run, store = saved
    engine = build(1, **OPTIONS, group=group)
    load_checkpoint(engine, find_checkpoint(run), world_size=1)
    assert engine.step == 3
    store.save(engine, {"position": "again"}, {})
    engine.close()
    assert names(run) == ["step_00000002", "step_00000003"]
    assert read_manifest(find_checkpoint(run))["data"] == [{"position": "again"}]


def test_another_loss_is_refused_with_what_to_do(saved, group):
    engine = build(1, **OPTIONS, group=group, loss=LossSection(name="sigmoid"))
    message = "which learns a temperature, and loss.name sigmoid learns a temperature and a bias"
    with pytest.raises(UserError, match=message):
        load_checkpoint(engine, find_checkpoint(saved[0]), world_size=1)
    assert engine.step == 0
    engine.close()


def test_weights_start_a_model_that_is_trained_otherwise(saved):
    trained = dict(patch_dropout=0.5, attention="math", fp8=True)
    assert set(trained) == set(OF_THE_RUN)
    weights, _ = load_init(find_checkpoint(saved[0]), replace(CONFIG, **trained))
    assert weights.keys() == read_checkpoint(saved[0]).state_dict.keys()


def test_another_model_is_refused_but_not_for_how_it_is_trained(saved, group):
    engine = build(1, **OPTIONS | {"patch_dropout": 0.5}, group=group)
    object.__setattr__(engine.config, "attention", "math")
    object.__setattr__(engine.config, "fp8", True)
    load_checkpoint(engine, find_checkpoint(saved[0]), world_size=1)
    object.__setattr__(engine.config, "layer_norm_eps", 1e-3)
    with pytest.raises(UserError, match="holds another model: layer_norm_eps differ"):
        load_checkpoint(engine, find_checkpoint(saved[0]), world_size=1)
    engine.close()


def test_a_disk_that_is_too_full_is_found_before_anything_is_written(small_disk, group):
    engine = build(1, **OPTIONS, group=group)
    engine.train_step(global_batch(0))
    store = CheckpointStore(small_disk, keep=2, tokenizer=NoTokenizer(), lineage=Lineage("this"))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - engine.bytes_to_save() // 2)))
    with pytest.raises(NoRoom, match=r"a checkpoint takes \S+ GB and \S+ GB are free in .*; make room there"):
        store.save(engine, {"position": 0}, {})
    assert not list((small_disk / "checkpoints").iterdir())
    filler.unlink()
    engine.close()


def test_a_save_that_fails_says_the_same_in_the_background_and_leaves_nothing(
    small_disk, group, monkeypatch, tmp_path_factory
):
    monkeypatch.setattr("dsclip.checkpoint.store.ROOM", 0)  # as if others had filled the disk after it was looked at
    engine = build(1, **OPTIONS, group=group)
    engine.train_step(global_batch(0))
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - engine.bytes_to_save() // 2))
    background, said = Background(engine.bytes_to_save(), engine.device), []
    for writing in (None, background):
        store = CheckpointStore(small_disk, keep=2, tokenizer=NoTokenizer(), background=writing)
        with pytest.raises(NoRoom) as refused:
            if writing is None:
                store.save(engine, {}, {})
            else:
                store.copy(engine, {}, {})
                store.finish(group, wait=True)
        said.append(str(refused.value))
        assert not list((small_disk / "checkpoints").iterdir()) and store.under_way is None
    assert said[0] == said[1] and "could not be written (No space left on device): a checkpoint takes" in said[0]
    store = CheckpointStore(tmp_path_factory.mktemp("large"), 2, NoTokenizer(), background=background)
    os.kill(background._process.pid, signal.SIGSTOP)
    store.copy(engine, {}, {})
    background._process.kill()
    with pytest.raises(
        NotSaved, match=r"^the process that writes it \(\d+\) was killed by SIGKILL. The newest checkpoint is none"
    ):
        store.finish(group, wait=True)
    assert not list(store.folder.iterdir())
    store.copy(engine, {}, {})
    folder, seconds = store.finish(group, wait=True)
    assert store.find(1) == folder and seconds > 0
    store.close()
    engine.close()


@pytest.mark.parametrize("options", [{"bf16": False}, {"bf16": True}], ids=str)
def test_the_size_of_a_checkpoint_is_known_beforehand(options, group, tmp_path):
    engine = build(1, **OPTIONS | options, group=group)
    engine.train_step(global_batch(0))
    saved = CheckpointStore(tmp_path, keep=2, tokenizer=NoTokenizer()).save(engine, {"position": 0}, {})
    size = sum(path.stat().st_size for path in saved.rglob("*.pt"))
    assert 0.8 < engine.bytes_to_save() / size <= 1.25, size
    engine.close()
