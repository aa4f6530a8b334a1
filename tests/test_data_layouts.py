"""Evaluation sets as people have them: class folders, tables, zips, CLIP_benchmark's shards; real files throughout."""

import json
import os
import shutil
import time

import pytest
import torch
from PIL import Image

from dsclip.data import build_eval_dataset
from dsclip.data.layouts.words import imagenet_names
from dsclip.errors import UserError
from tests.shard_files import jpeg, write_tar


def opened(path, **options):
    return build_eval_dataset(str(path), image_size=16, **options)


def class_folders(root, folders, images=2):
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for i in range(images):
            (root / folder / f"{i}.JPEG").write_bytes(jpeg(100 * number + i))
    return root


def test_a_folder_a_class_is_a_labelled_set(tmp_path):
    class_folders(tmp_path, ["sea_lion", "cat"])
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".DS_Store").write_text("hidden")
    dataset = opened(tmp_path)
    assert dataset.classes == ["cat", "sea lion"] and dataset.labels == [0, 0, 1, 1]
    assert dataset.captions == [[]] * 4 and dict(dataset.bad) == {"no JPEG, PNG or WebP file": 1}
    (tmp_path / "one").mkdir()
    write_tar(tmp_path / "one" / "0.tar", {"a": {"jpg": jpeg(0), "cls": b"0"}})
    assert torch.equal(dataset.image(2), opened(tmp_path / "one").image(0)), "as from a shard"


def test_names_beside_class_folders_come_before_the_folders(tmp_path):
    root = class_folders(tmp_path / "set" / "val", ["b", "a"])
    (tmp_path / "set" / "templates.txt").write_text("a picture of {}\n\n")
    (tmp_path / "set" / "classnames.txt").write_text("b\tsecond\na\tfirst\n")
    for path in (root, tmp_path / "set"):
        dataset = opened(path)
        assert dataset.classes == ["first", "second"] and dataset.templates == ["a picture of {}"]
    (root / "classnames.txt").write_text("x\ny\n")
    assert opened(root).classes == ["x", "y"], "in the order of the folders"
    (root / "classnames.txt").write_text("x\n")
    with pytest.raises(UserError, match="has 1 names and there are 2 class folders"):
        opened(root)
    (root / "classnames.txt").write_text("a\tx\n")
    with pytest.raises(UserError, match="no line for the folder b"):
        opened(root)


def test_imagenets_folders_have_names(tmp_path):
    names = imagenet_names()
    assert len(names) == 1000 and (names["n01440764"], names["n02012849"]) == ("tench", "crane bird")
    assert opened(class_folders(tmp_path, ["n02012849", "n01440764"])).classes == ["tench", "crane bird"]


def test_folders_that_are_numbers_are_in_their_order_and_have_no_names(tmp_path):
    """ImageNet-v2 has 0, 1, 10, 100, …: sorted as texts, class 2 would be 112."""
    dataset = opened(class_folders(tmp_path, ["0", "10", "2"], images=1))
    assert dataset.labels == [0, 2, 1] and dataset.classes is None


def test_the_held_out_split_is_taken_unless_another_is_asked_for(tmp_path):
    class_folders(tmp_path / "train", ["a", "b", "c"], images=3)
    class_folders(tmp_path / "val", ["a", "c"])
    dataset = opened(tmp_path)
    assert (dataset.split, dataset.labels, dataset.classes) == ("val", [0, 0, 2, 2], ["a", "b", "c"])
    assert len(opened(tmp_path, split="train")) == 9
    with pytest.raises(UserError, match=r"no split 'test'; choose one with split \(train, val\)"):
        opened(tmp_path, split="test")
    with pytest.raises(UserError, match="no splits to choose 'test' from"):
        opened(tmp_path / "val", split="test")


def test_a_class_that_is_called_train_is_no_split(tmp_path):
    assert opened(class_folders(tmp_path, ["train", "ship"])).classes == ["ship", "train"]


def write_table(folder, name, text, images=3):
    (folder / "images").mkdir(parents=True)
    for i in range(images):
        (folder / "images" / f"{i}.png").write_bytes(jpeg(i, format="PNG"))
    (folder / name).write_text(text, encoding="utf-8")
    return folder


TABLES = {
    "captions.tsv": 'filepath\tcaption\nimages/1.png\ta "b"\nimages/0.png\tsecond\nimages/1.png\tagain\n',
    "pairs.csv": 'id,image,Caption\n7,./images/1.png,"a ""b"""\n8,images/0.png,second\n9,images/1.png,again\n',
    "openclip.csv": 'filepath,title\nimages/1.png,"a ""b"""\nimages/0.png,second\nimages/1.png,again\n',
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("how", ["folder", "file", "zip"])
def test_tables_of_pairs_with_several_captions_an_image(tmp_path, name, how):
    path = write_table(tmp_path / "set", name, TABLES[name])
    if how == "file":
        path = path / name
    elif how == "zip":
        path = shutil.make_archive(str(tmp_path / "set"), "zip", path)
    dataset = opened(path)
    assert dataset.captions == [['a "b"', "again"], ["second"]] and dataset.labels == [None, None]
    first, second = (opened_image(tmp_path / "set" / "images" / f"{i}.png") for i in (1, 0))
    assert torch.equal(dataset.image(0), first) and torch.equal(dataset.image(1), second)


def opened_image(path):
    from dsclip.data.decoding.transforms import eval_image

    return eval_image(Image.open(path).convert("RGB"), 16)


def test_rows_without_an_image_are_counted_and_other_columns_named(tmp_path):
    text = "filepath\tcaption\timage_title\nimages/0.png\tfirst\tx\nnone.png\tlost\ty\nimages/1.png\t\tz\n"
    path = write_table(tmp_path, "captions.tsv", text)
    for way in (path, path / "captions.tsv"):
        assert dict(opened(way).bad) == {"missing image": 1, "no caption": 1}
        assert opened(way, caption_key="image_title").captions == [["x"], ["z"]]
    (path / "captions.tsv").write_text("a\tb\n")
    with pytest.raises(
        UserError, match=r"captions.tsv: the first line must be `filepath<TAB>caption`, and it is \['a', 'b'\]"
    ):
        opened(path)


def hub(folder, samples, kind=None, split="test"):
    """CLIP_benchmark's layout with one sample a shard, so that 10.tar comes before 2.tar by name."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    for i, members in enumerate(samples):
        write_tar(folder / split / f"{i}.tar", {f"s{i:07d}": members})
    (folder / split / "nshards.txt").write_text(f"{len(samples)}\n")
    if kind:
        (folder / "dataset_type.txt").write_text(kind)
    return folder


def test_clip_benchmarks_shards_are_read_in_their_order(tmp_path):
    kinds = ["jpg", "png", "webp"]
    samples = [
        {kinds[i % 3]: jpeg(i, format={"jpg": "JPEG"}.get(kinds[i % 3], kinds[i % 3])), "cls": str(i).encode()}
        for i in range(12)
    ]
    hub(tmp_path, samples)
    hub(tmp_path, samples[:2], split="train")
    (tmp_path / "classnames.txt").write_text("\n".join(f"c{i}" for i in range(12)))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n")
    for path in (tmp_path, tmp_path / "test"):
        dataset = opened(path)
        assert dataset.labels == list(range(12)) and dataset.classes[11] == "c11"
        assert dataset.templates == ["a photo of {c}."]
    assert len(opened(tmp_path, split="train")) == 2
    (tmp_path / "test" / "11.tar").unlink()
    with pytest.raises(UserError, match="11.tar does not exist"):
        opened(tmp_path)


def test_a_retrieval_set_of_clip_benchmark_has_a_caption_a_line(tmp_path):
    samples = [{"jpg": jpeg(i), "txt": f"one {i}\ntwo {i}\n".encode()} for i in range(2)]
    assert opened(hub(tmp_path, samples, "retrieval\n")).captions == [["one 0", "two 0"], ["one 1", "two 1"]]


def test_what_is_not_recognised_is_one_line(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    with pytest.raises(UserError, match="it holds 1 files, 1 of them images, and neither shards") as found:
        opened(tmp_path)
    assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="a.jpg is no evaluation set: neither a tar shard"):
        opened(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="does not exist"):
        opened(tmp_path / "none")


def test_an_image_file_that_is_broken_or_gone_is_left_out(tmp_path):
    from dsclip.evaluate import Embedder
    from dsclip.losses import SingleRank

    class_folders(tmp_path, ["a", "b"], images=2)
    dataset = opened(tmp_path)
    (tmp_path / "a" / "0.JPEG").unlink()
    (tmp_path / "b" / "1.JPEG").write_bytes(b"no JPEG")
    embedder = Embedder(lambda x: x[:, 0, 0, :2].float(), None, None, SingleRank(), 4, batch_size=3)
    assert embedder.images(dataset, [0, 1, 2, 3])[1] == [1, 2]
    assert dict(dataset.bad) == {"unreadable file": 1, "undecodable image": 1}


def test_a_part_of_class_folders_has_all_classes(tmp_path):
    class_folders(tmp_path, ["a", "b", "c"], images=4)
    assert opened(tmp_path, max_samples=3).labels == [0, 1, 2]
    assert opened(tmp_path, max_samples=5).labels == [0, 0, 1, 1, 2]
    assert opened(tmp_path, max_samples=99).labels == [0] * 4 + [1] * 4 + [2] * 4


def test_many_files_are_listed_at_once(tmp_path):
    """Hard links to one picture; 100,000 in 1,000 folders take 0.6 s on an idle core."""
    (tmp_path / "one.jpg").write_bytes(jpeg(0))
    for folder in range(100):
        (tmp_path / "set" / f"class_{folder}").mkdir(parents=True)
        for i in range(200):
            os.link(tmp_path / "one.jpg", tmp_path / "set" / f"class_{folder}" / f"{i:08d}.jpg")
    start = time.process_time()
    assert len(opened(tmp_path / "set")) == 20_000
    assert time.process_time() - start < 0.9


def test_negatives_and_json_captions_of_shards_are_read_as_before(tmp_path):
    text = json.dumps({"caption": ["x", "y"], "negatives": ["z"]}).encode()
    write_tar(tmp_path / "0.tar", {"a": {"jpg": jpeg(0), "json": text}})
    dataset = opened(tmp_path / "0.tar")
    assert dataset.captions == [["x", "y"]] and dataset.negatives == [["z"]]
    with pytest.raises(UserError, match="no splits to choose"):
        opened(tmp_path / "0.tar", split="val")
