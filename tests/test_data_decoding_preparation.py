"""The demo, tokenizers, preprocessing and make_shards."""

import hashlib
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dsclip.data import build_eval_dataset, load_tokenizer, read_manifest, resolve_shards
from dsclip.data.decoding.sample import decode_image
from dsclip.data.decoding.transforms import eval_image, random_crop, train_image
from dsclip.data.reading.samples import read_shard
from dsclip.datasets.cli import main as make_shards_command
from dsclip.datasets.demo import write_demo
from dsclip.datasets.make import make_shards
from dsclip.datasets.scenes import COLOURS, HELD_OUT, SHAPES
from dsclip.errors import UserError
from tests.shard_files import jpeg


def digests(folder) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_the_demo_is_the_same_bytes_for_the_same_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_demo(tmp_path / name, seed, train_samples=40, val_samples=20)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != digests(tmp_path / "c")


@pytest.mark.parametrize("size", [(32, 32), (40, 37), (37, 40), (500, 375), (300, 100)])
def test_a_crop_of_the_whole_area_draws_nothing(size):
    rng = np.random.default_rng(0)
    boxes = {random_crop(*size, [1.0, 1.0], rng) for _ in range(200)}
    assert len(boxes) == 1 and rng.random() == np.random.default_rng(0).random()
    assert boxes == {(0, 0, *size)} or size == (300, 100)


def test_held_out_combinations_never_occur_in_training(demo):
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    held_out = {f"{colour} {shape}" for colour, shape in HELD_OUT}
    train, val = (build_eval_dataset(f"demo:{split}", image_size=64, max_samples=2000) for split in ("train", "val"))
    shown = {n for captions in train.captions for c in captions for n in names if n in c}
    assert shown == set(names) - held_out
    tested = {val.classes[label] for label in val.labels if label is not None}
    assert tested == held_out
    assert {n.split()[0] for n in shown} == set(COLOURS) and {n.split()[1] for n in shown} == set(SHAPES)


def test_swapped_captions_are_wrong_use_the_scenes_own_words_and_keep_the_splits_apart(demo):
    names = {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES}
    held_out = {f"{colour} {shape}" for colour, shape in HELD_OUT}
    for split, allowed in (("train", names - held_out), ("val", held_out)):
        dataset = build_eval_dataset(f"demo:{split}", image_size=64, max_samples=400)
        with_negatives = 0
        for captions, negatives in zip(dataset.captions, dataset.negatives, strict=True):
            assert not set(captions) & set(negatives)
            assert {name for sentence in negatives for name in names if name in sentence} <= allowed
            words = {word for caption in captions for word in caption.split()} & {*COLOURS, *SHAPES, "small", "large"}
            assert all({w for w in n.split() if w in {*COLOURS, *SHAPES, "small", "large"}} <= words for n in negatives)
            with_negatives += bool(negatives)
        assert with_negatives == 200  # the scenes with two objects


def test_manifests_tell_size_and_hash_of_every_shard(demo):
    manifest = read_manifest(resolve_shards("demo:train"))
    assert (
        manifest["samples"]
        == sum(s["samples"] for s in manifest["shards"])
        == len(list((demo / "train").glob("*.tar"))) * 1000
    )
    for shard in manifest["shards"]:
        content = (demo / "train" / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_tokens_begin_end_and_pad_as_clip_does(demo):
    tokenizer = load_tokenizer("demo")
    short, long = tokenizer(["a red circle", "a red circle " * 50], 16)
    end = tokenizer.eot_token_id
    assert short[0] == long[0] != end
    assert (short == end).nonzero()[0] < 15 and long[-1] == end and (long == end).sum() == 1
    assert tokenizer.vocab_size == end + 1


def test_every_text_can_be_encoded(demo):
    tokenizer = load_tokenizer("demo")
    for text in ("Zürich €5", "日本 🐈!", "x\ty", "naïve café"):
        ids = tokenizer([text], 64)[0].tolist()
        body = ids[1 : ids.index(tokenizer.eot_token_id)]
        assert "".join(tokenizer._hf.decode(body).split()) == "".join(text.lower().split())


def test_a_saved_tokenizer_is_the_same_one(demo, tmp_path):
    tokenizer = load_tokenizer("demo")
    tokenizer.save(tmp_path / "t")
    again = load_tokenizer(str(tmp_path / "t"))
    captions = ["a large red ring above a small cyan star", "Ä"]
    assert torch.equal(tokenizer(captions, 32), again(captions, 32))


@pytest.mark.parametrize("name", ["/nowhere/tokenizer", "no-such-user/no-such-model", "plainword"])
def test_a_missing_tokenizer_is_named_with_advice(name):
    with pytest.raises(UserError, match=f"{name}.*give a folder with tokenizer.json"):
        load_tokenizer(name)


@pytest.mark.parametrize("width, height", [(64, 64), (100, 67), (67, 100), (31, 200), (224, 224), (333, 251)])
def test_evaluation_pixels_equal_huggingfaces(width, height):
    from transformers import CLIPImageProcessor

    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, do_normalize=False, do_rescale=False
    )
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    assert np.array_equal(eval_image(image, 64).numpy(), theirs.astype(np.uint8))


def test_a_rotation_in_exif_is_ignored_as_by_huggingfaces_processor(tmp_path):
    """The processor that an export has sees what Pillow decoded; only transformers' `load_image` turns it."""
    from transformers import CLIPImageProcessor

    exif = Image.Exif()
    exif[0x0112] = 6  # "the 0th row is the right-hand side": a camera held upright
    pixels = np.random.default_rng(0).integers(0, 256, (48, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.jpg", exif=exif, quality=95)
    Image.fromarray(pixels).save(tmp_path / "plain.jpg", quality=95)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False, do_rescale=False
    )
    theirs = np.asarray(processor(Image.open(tmp_path / "0.jpg"), return_tensors="np")["pixel_values"][0])
    (tmp_path / "pairs.tsv").write_text("filepath\tcaption\n0.jpg\tturned\nplain.jpg\tplain\n")
    dataset = build_eval_dataset(str(tmp_path / "pairs.tsv"), image_size=32)
    assert np.array_equal(dataset.image(0).numpy(), theirs.astype(np.uint8))
    assert torch.equal(dataset.image(0), dataset.image(1)), "as if there were no EXIF"


def test_random_crops_stay_inside_and_keep_the_asked_area():
    rng = np.random.default_rng(0)
    for width, height in ((64, 64), (200, 50), (30, 90)):
        for _ in range(200):
            left, top, right, bottom = random_crop(width, height, [0.5, 1.0], rng)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            ratio = (right - left) / (bottom - top)
            assert 0.7 < ratio < 1.4


def test_training_crops_depend_on_the_generator_only():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    first, same, other = (train_image(image, 32, [0.3, 1.0], np.random.default_rng(s)) for s in (5, 5, 6))
    assert torch.equal(first, same) and not torch.equal(first, other)


def caption_zip(path):
    rows = "filepath\tcaption\n" + "".join(f"images/{i}.jpg\tcaption {i}.{k}\n" for i in range(20) for k in range(2))
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("captions.tsv", rows + "images/missing.jpg\tnothing\n")
        for i in range(20):
            z.writestr(f"images/{i}.jpg", jpeg(i, 40))
    return path


def test_captions_become_pairs_split_by_path(tmp_path):
    summary = make_shards(caption_zip(tmp_path / "p.zip"), tmp_path / "out", shard_size=6, holdout=0.3)
    assert summary.samples["train"] + summary.samples["val"] == 20 and summary.skipped == {"missing image": 1}
    train, val = (build_eval_dataset(str(tmp_path / "out" / s), image_size=32) for s in ("train", "val"))
    captions = [c for d in (train, val) for cs in d.captions for c in cs]
    assert sorted(captions) == sorted(f"caption {i}.{k}" for i in range(20) for k in range(2))
    assert all(len({c.split(".")[0] for c in cs}) == 1 and len(cs) == 2 for cs in train.captions)


def test_class_folders_become_labelled_sets(tmp_path):
    for split in ("train", "test"):
        for name in ("sea_lion", "cat"):
            folder = tmp_path / "src" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                (folder / f"{i}.jpg").write_bytes(jpeg(hash((split, name, i)) % 1000, 20))
    summary = make_shards(tmp_path / "src", tmp_path / "out", tokenizer_size=600)
    assert summary.samples == {"train": 6, "test": 6} and summary.classes == ["cat", "sea lion"]
    test = build_eval_dataset(str(tmp_path / "out" / "test"), image_size=16)
    assert test.classes == ["cat", "sea lion"] and test.templates == ["a photo of a {}."]
    for label, captions in zip(test.labels, test.captions, strict=True):
        assert captions == [f"a photo of a {test.classes[label]}."]
    assert load_tokenizer(summary.tokenizer).vocab_size <= 600


def test_large_images_are_resized_on_request(tmp_path):
    caption_zip(tmp_path / "p.zip")
    make_shards(tmp_path / "p.zip", tmp_path / "small", size=24, holdout=0)
    make_shards(tmp_path / "p.zip", tmp_path / "whole", holdout=0)
    for name, expected in (("small", 24), ("whole", 40)):
        raw = list(read_shard(tmp_path / name / "00000.tar", {}))
        assert len(raw) == 20 and all(decode_image(r, 10_000).size == (expected, expected) for r in raw)


def test_the_command_prints_json_and_exits_with_two_for_wrong_input(tmp_path, capsys):
    caption_zip(tmp_path / "p.zip")
    with pytest.raises(SystemExit) as done:
        make_shards_command([str(tmp_path / "p.zip"), str(tmp_path / "out"), "--json", "--holdout", "0"])
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["samples"] == {"all": 20}
    for source, message in (
        (tmp_path / "p.zip", "holds shards already"),
        (tmp_path / "nowhere", "neither a folder nor a zip"),
    ):
        with pytest.raises(SystemExit) as done:
            make_shards_command([str(source), str(tmp_path / "out")])
        assert done.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_without_captions_or_classes_is_refused(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.jpg").write_bytes(jpeg(0))
    with pytest.raises(UserError, match="no captions.tsv and no folders of images"):
        make_shards(tmp_path / "src", tmp_path / "out")
