"""SugarCrepe, SugarCrepe++, ARO and Winoground are read from their own files."""

import json
import zipfile

import pytest
import torch
from PIL import Image

from dsclip.data import build_eval_dataset
from dsclip.errors import UserError
from tests.shard_files import jpeg


def write_images(folder, names, size=32, format="JPEG"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(jpeg(i, size, format))


def sugarcrepe(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, samples in files.items():
        (folder / f"{name}.json").write_text(json.dumps(samples))
    return str(folder)


def sample(image, own, wrong, **more):
    return {"filename": image, "caption": own, "negative_caption": wrong, **more}


def opened(path, **options):
    return build_eval_dataset(path, image_size=16, **options)


def test_sugarcrepe_is_a_folder_of_objects_with_numbers_that_may_have_gaps(tmp_path):
    write_images(tmp_path / "val2017", ["1.jpg", "2.jpg"])
    files = {"add_att": {"0": sample("1.jpg", "a", "not a"), "7": sample("2.jpg", "b", "not b")}, "swap_obj": {"0": sample("1.jpg", "c", "not c")}}  # fmt: skip
    dataset = opened(sugarcrepe(tmp_path / "data", **files))
    assert dataset.captions == [["a"], ["b"], ["c"]] and dataset.negatives == [["not a"], ["not b"], ["not c"]]
    assert dataset.groups == ["add_att", "add_att", "swap_obj"] and not dataset.pairs
    assert dataset.same_images() == [0, 1, 0], "the first image is there twice, and embedded once"
    assert torch.equal(dataset.image(0), dataset.image(2)) and not torch.equal(dataset.image(0), dataset.image(1))
    assert len(opened(str(tmp_path / "data" / "swap_obj.json"))) == 1


def test_sugarcrepe_pp_is_a_list_with_a_second_caption(tmp_path):
    write_images(tmp_path / "coco", ["1.jpg"])
    samples = [sample("1.jpg", "a", "not a", caption2="a too"), sample("gone.jpg", "b", "not b", caption2="b too")]
    dataset = opened(sugarcrepe(tmp_path / "data", swap_att=samples), images=str(tmp_path / "coco"))
    assert dataset.captions == [["a", "a too"]] and dict(dataset.bad) == {"missing image": 1}


def test_aro_shows_the_box_alone(tmp_path):
    picture = Image.new("RGB", (64, 64), "blue")
    picture.paste("red", (20, 10, 52, 42))
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images" / "1.png")
    box = {"bbox_x": 20, "bbox_y": 10, "bbox_w": 32, "bbox_h": 32}
    words = {"image_path": "1.png", "true_caption": "a on b", "false_caption": "b on a"}
    whole = {**words, "bbox_x": 0, "bbox_y": 0, "bbox_w": 64, "bbox_h": 64}
    samples = [{**words, **box, "relation_name": "on"}, {**whole, "relation_name": "under"}]
    (tmp_path / "visual_genome_relation.json").write_text(json.dumps(samples))
    dataset = opened(str(tmp_path))
    assert dataset.groups == ["on", "under"] and dataset.negatives == [["b on a"], ["b on a"]]
    assert (dataset.image(0) == torch.tensor([255, 0, 0])[:, None, None]).all() and (dataset.image(1)[2] > 0).any()
    assert dataset.same_images() == [0, 1] and dataset.same_images(in_any_box=True) == [0, 0]
    samples[1]["bbox_w"] = 0
    (tmp_path / "visual_genome_relation.json").write_text(json.dumps(samples))
    with pytest.raises(UserError, match="sample 1 is damaged .ValueError: an empty box"):
        opened(str(tmp_path))


def test_orders_of_aro_are_a_caption_and_other_orders_of_its_words(tmp_path):
    write_images(tmp_path / "images", ["1.jpg"])
    options = ["a dog runs", "dog a runs", "runs a dog"]
    file = tmp_path / "coco_order.json"
    file.write_text(json.dumps([{"image": "1.jpg", "caption_options": options}]))
    dataset = opened(str(file))
    assert (dataset.captions, dataset.negatives, dataset.groups) == ([options[:1]], [options[1:]], ["coco_order"])
    file.write_text(json.dumps([{"image": "1.jpg", "caption_options": options[:1]}]))
    with pytest.raises(UserError, match="sample 0 is damaged .ValueError: no other order"):
        opened(str(file))


def test_winogavil_is_a_row_a_candidate_and_whole_cues_alone(tmp_path):
    write_images(tmp_path / "images", ["cat.jpg", "fox.jpg", "sea.jpg"])
    cues = [("Orange", ["cat", "fox"], ["fox"]), ("wet", ["sea", "gone"], ["sea"]), ("blue", ["sea", "cat"], ["sea"])]
    file = tmp_path / "winogavil.jsonl"
    names = ("cue", "candidates", "associations")
    file.write_text("\n".join(json.dumps(dict(zip(names, cue, strict=True))) for cue in cues))
    dataset = opened(str(file))
    assert dataset.cues and dataset.captions == [["Orange"]] * 2 + [["blue"]] * 2 and dataset.labels == [0, 1, 1, 0]
    assert len(set(dataset.groups)) == 2 and dataset.same_images() == [0, 1, 2, 0]
    assert dict(dataset.bad) == {"missing image": 2}
    for candidates, associations, words in (
        (["sea"], ["gone"], "associations of 'wet' must be among its candidates"),
        (["sea"], ["sea", "gone"], "associations of 'wet' must be among its candidates"),
        (["sea", "sea"], ["sea"], "a candidate of 'wet' stands twice"),
        ("sea", ["sea"], "candidates and associations of 'wet' must be lists"),
    ):
        file.write_text(json.dumps(dict(zip(names, ("wet", candidates, associations), strict=True))))
        with pytest.raises(UserError, match=f"sample 0 is damaged .ValueError: .*{words}"):
            opened(str(file))


def test_attributes_with_fewer_than_25_samples_are_in_no_group(tmp_path):
    write_images(tmp_path / "images", ["1.jpg"])
    words = {"image_path": "1.jpg", "true_caption": "a", "false_caption": "b"}
    samples = [{**words, "attributes": ["red", "old"]}] * 25 + [{**words, "attributes": ["new", "old"]}] * 24
    (tmp_path / "visual_genome_attribution.json").write_text(json.dumps(samples))
    assert opened(str(tmp_path)).groups == ["red_old"] * 25 + [None] * 24


@pytest.mark.parametrize("zipped", [False, True])
def test_winoground_is_pairs_a_line_each(tmp_path, zipped):
    names = [f"ex_{i}_img_{k}.png" for i in range(3) for k in range(2)]
    write_images(tmp_path / "images", names, format="PNG")
    if zipped:
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            [archive.write(tmp_path / "images" / name, f"images/{name}") for name in names if name != "ex_2_img_1.png"]
    else:
        (tmp_path / "images" / "ex_2_img_1.png").unlink()
    lines = [
        {
            "id": i, "image_0": f"ex_{i}_img_0", "image_1": f"ex_{i}_img_1", "caption_0": f"{i}: a b", "caption_1": f"{i}: b a",
            "tag": "Adjective", "collapsed_tag": "Object",
        }
        for i in range(3)
    ]  # fmt: skip
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = opened(str(tmp_path), images=str(tmp_path / "images.zip") if zipped else None)
    assert dataset.pairs and len(dataset) == 4, "a pair that lacks an image is left out whole"
    assert dict(dataset.bad) == {"missing image": 2}
    assert dataset.captions[2:] == [["1: a b"], ["1: b a"]] and dataset.negatives[2:] == [["1: b a"], ["1: a b"]]
    assert dataset.groups == ["Object"] * 4 and dataset.image(3).shape == (3, 16, 16)
    assert len(opened(str(tmp_path), max_samples=3)) == 2, "never half a pair"


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a": [sample("1.jpg", "a", "b"), {"filename": "1.jpg"}]}, "a.json: sample 1 is damaged .KeyError: 'caption'"),
        ({"a": [sample("1.jpg", "a", " ")]}, "sample 0 is damaged: its image and captions must be words"),
        ({"a": [sample("../1.jpg", "a", "b")]}, "sample 0 is damaged"),
        ({"a": [sample("2.jpg", "a", "b")]}, r"its images aren't in .* .2.jpg is the first.; give their folder or zip"),
        ({"a": [sample("1.jpg", "a", "b")], "b": [{"image_path": "1.jpg", "true_caption": "a", "false_caption": "b"}]}, "several kinds"),
    ],
)  # fmt: skip
def test_a_damaged_set_is_one_sentence(tmp_path, files, message):
    write_images(tmp_path / "images", ["1.jpg"])
    with pytest.raises(UserError, match=message):
        opened(sugarcrepe(tmp_path / "data", **files))


def test_json_files_that_are_no_set_are_counted_or_left_to_other_layouts(tmp_path):
    write_images(tmp_path / "images", ["1.jpg"])
    folder = sugarcrepe(tmp_path / "data", a=[sample("1.jpg", "a", "b")], notes={"version": 1})
    assert dict(opened(folder).bad) == {"JSON file of another kind": 1}
    write_images(tmp_path / "classes" / "cat", ["1.jpg"])
    write_images(tmp_path / "classes" / "dog", ["2.jpg"])
    (tmp_path / "classes" / "info.json").write_text("{}")
    assert opened(str(tmp_path / "classes")).classes == ["cat", "dog"]
    with pytest.raises(UserError, match="says itself where its images are"):
        opened(str(tmp_path / "classes"), images=str(tmp_path))
