"""Sets of the library `datasets`: written by it, read by it, and the same images, labels and captions as from files."""

import io
import json

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


def images(*numbers):
    return [{"bytes": jpeg(i), "path": None} for i in numbers]


def stored(folder, rows, **kinds):
    """A folder of parquet files, as a repository of the hub has them."""
    (folder / "data").mkdir(parents=True)
    table = datasets.Dataset.from_dict(rows)
    for column, kind in kinds.items():
        table = table.cast_column(column, kind)
    table.to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return build_eval_dataset(str(folder), image_size=16)


def test_winoground_of_the_hub_is_that_of_its_files(tmp_path):
    """Columns as facebook/winoground has them."""
    rows = {
        "id": [0, 1], "image_0": images(0, 1), "image_1": images(2, 3), "caption_0": ["a b", "c d"], "caption_1": ["b a", "d c"],
        "tag": ["Adjective-Color", "Scope"], "collapsed_tag": ["Object", "Relation"],
    }  # fmt: skip
    found = stored(tmp_path / "hub", rows, image_0=datasets.Image(), image_1=datasets.Image())
    (tmp_path / "files" / "images").mkdir(parents=True)
    lines = []
    for i in range(2):
        for side in range(2):
            (tmp_path / "files" / "images" / f"{i}_{side}.jpg").write_bytes(jpeg(i + 2 * side))
        of_row = {key: rows[key][i] for key in ("caption_0", "caption_1", "tag", "collapsed_tag")}
        lines.append(json.dumps({**of_row, "image_0": f"{i}_0", "image_1": f"{i}_1"}))
    (tmp_path / "files" / "examples.jsonl").write_text("\n".join(lines))
    files = build_eval_dataset(str(tmp_path / "files"), image_size=16)
    assert found.pairs and (found.captions, found.negatives, found.groups) == (
        files.captions,
        files.negatives,
        files.groups,
    )
    assert all(torch.equal(found.image(i), files.image(i)) for i in range(4)) and found.split == "test"


def test_orders_of_aro_have_as_many_hard_negatives_as_columns(tmp_path):
    """Columns as gowitheflow/ARO-COCO-order has them."""
    rows = {"images": images(0, 1), "correct_caption": ["a b c", "d e"]} | {
        f"hard_text_{k}": [f"n{k}", f"m{k}"] for k in range(1, 5)
    }
    found = stored(tmp_path / "hub", rows, images=datasets.Image())
    assert found.captions == [["a b c"], ["d e"]] and found.negatives == [
        ["n1", "n2", "n3", "n4"],
        ["m1", "m2", "m3", "m4"],
    ]
    relation = {"images": images(0), "true_caption": ["a on b"], "false_caption": ["b on a"]}
    found = stored(tmp_path / "relation", relation, images=datasets.Image())
    assert (found.captions, found.negatives) == ([["a on b"]], [["b on a"]])
    with pytest.raises(UserError, match="row 1 is damaged: it lacks a text"):
        stored(tmp_path / "bad", rows | {"hard_text_2": ["n2", ""]}, images=datasets.Image())


def winogavil():
    """Columns as nlphuji/winogavil has them: a picture of one name is in several cues, and one cue has no association."""
    return {
        "cue": ["Orange", "wet", "lost"], "candidates": [["cat", "fox", "sea"], ["sea", "dog"], ["cat", "dog"]],
        "associations": [["fox"], ["sea", "gone"], ["gone"]], "candidate_images": [images(0, 1, 2), images(9, 3), images(0, 3)],
    }  # fmt: skip


def test_winogavil_is_a_row_a_candidate_and_a_picture_of_one_name_is_one(tmp_path):
    found = stored(tmp_path / "hub", winogavil(), candidate_images=datasets.List(datasets.Image()))
    assert found.cues and found.captions == [["Orange"]] * 3 + [["wet"]] * 2
    assert found.labels == [0, 1, 0, 1, 0] and found.groups == ["0"] * 3 + ["1"] * 2
    assert found.same_images() == [0, 1, 2, 2, 4] and dict(found.bad) == {"no association among the candidates": 1}
    write_tar(tmp_path / "0.tar", {f"{i}": {"jpg": jpeg(i), "cls": b"0"} for i in range(4)})
    shards = build_eval_dataset(str(tmp_path / "0.tar"), image_size=16)
    assert all(torch.equal(found.image(i), shards.image(j)) for i, j in enumerate((0, 1, 2, 2, 3)))
    cut = build_eval_dataset(str(tmp_path / "hub"), image_size=16, max_samples=4)
    assert cut.labels == [0, 1, 0], "a cue with all its candidates"


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
