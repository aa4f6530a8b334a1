"""Sets of the library `datasets`: written by it, read by it, and the same images, labels and captions as from files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dsclip.data import build_eval_dataset
from dsclip.errors import UserError
from tests.shard_files import jpeg, write_tar

datasets = pytest.importorskip("datasets")


def png(number: int) -> bytes:
    content = io.BytesIO()
    Image.open(io.BytesIO(jpeg(number))).save(content, "PNG")
    return content.getvalue()


def labelled(count=4):
    kinds = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": jpeg(i) if i % 2 else png(i), "path": None} for i in range(count)]
    return datasets.Dataset.from_dict({"img": images, "label": [i % 2 for i in range(count)]}, features=kinds)


def opened(path, **options):
    return build_eval_dataset(f"datasets:{path}", image_size=16, **options)


def test_a_labelled_set_is_that_of_the_same_files(tmp_path):
    datasets.DatasetDict({"train": labelled(2), "test": labelled()}).save_to_disk(tmp_path / "set")
    found = opened(tmp_path / "set")
    assert (found.classes, found.labels, found.split) == (["cat", "dog"], [0, 1, 0, 1], "test")
    write_tar(
        tmp_path / "0.tar",
        {f"{i}": {"jpg" if i % 2 else "png": (jpeg if i % 2 else png)(i), "cls": b"0"} for i in range(4)},
    )
    shards = build_eval_dataset(str(tmp_path / "0.tar"), image_size=16)
    assert all(torch.equal(found.image(i), shards.image(i)) for i in range(4))
    assert len(opened(tmp_path / "set", split="train")) == 2 and len(opened(tmp_path / "set", max_samples=3)) == 3


def test_captions_are_texts_lists_or_records_and_labels_may_be_withheld(tmp_path):
    images = [{"bytes": jpeg(i), "path": None} for i in range(3)]
    kinds = datasets.Features({"image": datasets.Image(), "sentences": [{"raw": datasets.Value("string")}]})
    rows = {"image": images, "sentences": [[{"raw": "a"}, {"raw": " b "}], [{"raw": "c"}], []]}
    (tmp_path / "coco").mkdir()
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "coco" / "test-0.parquet")
    assert opened(tmp_path / "coco").captions == [["a", "b"], ["c"], []]
    kinds = datasets.Features(
        {"image": datasets.Image(), "said": datasets.Value("string"), "label": datasets.Value("int64")}
    )
    rows = {"image": images, "said": ["x", "y", "z"], "label": [1, -1, 0]}
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "said")
    found = opened(tmp_path / "said", caption_key="said")
    assert found.captions == [["x"], ["y"], ["z"]] and found.labels == [1, None, 0] and found.classes is None


def test_images_that_are_none_are_left_out_when_they_are_asked_for(tmp_path):
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    images = [{"bytes": jpeg(0), "path": None}, None, {"bytes": b"text", "path": None}]
    rows = {"image": images, "caption": ["a", "b", "c"]}
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "set")
    found = opened(tmp_path / "set")
    reasons = []
    for i in (1, 2):
        with pytest.raises(Exception, match="un") as refused:
            found.image(i)
        reasons.append(str(refused.value))
    assert reasons == ["unreadable file", "undecodable image"]
    assert found.image(0).shape == (3, 16, 16)


def test_its_fingerprint_changes_with_the_set(tmp_path):
    labelled().save_to_disk(tmp_path / "one")
    labelled(3).save_to_disk(tmp_path / "two")
    prints = [opened(tmp_path / name).fingerprint() for name in ("one", "one", "two")]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("nowhere/at_all", {}, "can't be opened"),
        ("set", {"split": "val"}, "has no splits to choose 'val' from"),
        ("numbers", {}, "has no column of images; it has n"),
        ("bare", {}, "has neither captions nor labels"),
    ],
)
def test_what_is_no_evaluation_set_is_one_sentence(tmp_path, name, options, message):
    labelled().save_to_disk(tmp_path / "set")
    labelled().remove_columns("label").save_to_disk(tmp_path / "bare")
    datasets.Dataset.from_dict({"n": np.arange(3)}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(UserError, match=message):
        opened(tmp_path / name, **options)
