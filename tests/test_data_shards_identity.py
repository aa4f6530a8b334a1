"""Shards are the same wherever they lie, and others when their sizes or contents are others."""

import itertools
import shutil

import pytest

from dsclip.config.schema import DataSection
from dsclip.data import build_loader
from dsclip.data.sources.storage import LOCAL
from dsclip.datasets.index import index_shards
from dsclip.errors import UserError
from tests.http_shards import serve
from tests.shard_files import sample, write_set, write_tar


def loader(shards, tokenizer, state=None, **options):
    data = DataSection(train_shards=shards if isinstance(shards, list) else str(shards), **{"workers": 0, **options})
    return build_loader(
        data, tokenizer=tokenizer, image_size=16, context_length=16, global_batch_size=8, seed=0, state=state
    )


def indexed(folder, **options):
    write_set(folder, 2, 16, **options)
    index_shards(str(folder), None, LOCAL)
    return folder


def test_a_set_that_moves_gives_the_same_batches_and_continues(tmp_path, tokenizer):
    folder = indexed(tmp_path / "here", captions=3)
    batches = list(itertools.islice(loader(folder, tokenizer, crop_scale=[0.3, 1.0]), 6))
    shutil.move(folder, tmp_path / "elsewhere")
    moved = loader(tmp_path / "elsewhere", tokenizer, state=batches[2].state, crop_scale=[0.3, 1.0])
    for found, expected in zip(moved, batches[3:], strict=False):
        assert found.sample_ids.tolist() == expected.sample_ids.tolist()
        assert found.report.captions == expected.report.captions and (found.images == expected.images).all()
    with serve(tmp_path / "elsewhere") as (_, url, host):
        far = next(iter(loader(url, tokenizer, trusted_hosts=[host], crop_scale=[0.3, 1.0])))
    assert (far.images == batches[0].images).all()


def test_equal_file_names_of_several_sets_are_told_apart(tmp_path, tokenizer):
    folders = [str(indexed(tmp_path / name)) for name in ("a", "b")]
    for options in ({}, {"weights": [1.0, 1.0]}):
        found = list(itertools.islice(loader(folders, tokenizer, **options), 16))
        ids = {i for batch in found for i in batch.sample_ids.tolist()}
        assert len(ids) > 32, "32 samples of either set, with the same keys in files of the same names"


def test_a_state_that_names_folders_continues(tmp_path, tokenizer):
    """As versions before wrote it: of the last folder and the file."""
    folder = indexed(tmp_path / "photos")
    state = next(iter(loader(folder, tokenizer))).state
    order = dict(state["order"])
    order["data"] = order.pop("data_in_folders")
    del order["content"]
    assert order["data"] != state["order"]["data"]
    loader(folder, tokenizer, state=state | {"order": order})
    shutil.move(folder, tmp_path / "other")
    with pytest.raises(UserError, match="the shards changed"):
        loader(tmp_path / "other", tokenizer, state=state | {"order": order})


def test_shards_of_the_same_names_with_another_content_are_refused_on_resume(tmp_path, tokenizer):
    folder = indexed(tmp_path / "set")
    state = next(iter(loader(folder, tokenizer))).state
    write_tar(folder / "001.tar", {f"{i:05d}": sample(i + 500) for i in range(16, 32)})
    index_shards(str(folder), None, LOCAL)
    with pytest.raises(UserError, match="the same names have another content"):
        loader(folder, tokenizer, state=state)
    (folder / "manifest.json").unlink()
    loader(folder, tokenizer, state=state)  # nothing tells


@pytest.mark.parametrize("remote", [False, True])
def test_shards_that_are_not_as_long_as_their_manifest_says_are_found_at_start(tmp_path, tokenizer, remote):
    folder = indexed(tmp_path / "set")
    with (folder / "001.tar").open("ab") as stream:
        stream.write(bytes(512))
    with serve(folder) as (_, url, host):
        spec, options = (url, {"trusted_hosts": [host]}) if remote else (folder, {})
        with pytest.raises(UserError, match=r"1 shards are not as long.*001.tar \([0-9,]+ instead of [0-9,]+ bytes"):
            loader(spec, tokenizer, **options)
        batch = next(iter(loader(spec, tokenizer, on_unreadable="skip", **options)))
        assert batch.report.bad["size is not the manifest's"] == 1
