"""make_shards: splits, encodings, image keys, and the recipe it writes."""

import json
import shlex

import pytest
import yaml

from dsclip.config import load_recipe
from dsclip.data import build_eval_dataset, build_loader, load_tokenizer
from dsclip.data.reading.samples import read_shard
from dsclip.datasets.cli import main as make_shards_command
from dsclip.datasets.make import make_shards
from dsclip.datasets.ready_recipe import largest_batch
from dsclip.errors import UserError
from tests.shard_files import jpeg


def pairs(folder, count=20, encoding="utf-8", text="a caption of number {}", same=()):
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["filepath\tcaption", *(f"{i}.jpg\t{text.format(i)}" for i in range(count))]
    (folder / "captions.tsv").write_bytes("\n".join(rows).encode(encoding))
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(jpeg(0 if i in same else i, 40))
    return folder


def classes(folder, *splits):
    for split in splits:
        for number, name in enumerate(("cat", "dog", "sea_lion")):
            (folder / split / name).mkdir(parents=True)
            for i in range(6):
                (folder / split / name / f"{i}.png").write_bytes(jpeg(100 * number + i, 32, "PNG"))
    return folder


def command(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        make_shards_command([str(a) for a in arguments])
    shown = capsys.readouterr()
    return done.value.code, shown.out, shown.err


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val", "test")])
def test_a_holdout_of_a_source_with_splits_is_refused(tmp_path, splits):
    classes(tmp_path / "src", *splits)
    with pytest.raises(UserError, match=r"has splits of its own \(.*train/.*\), which --holdout would mix"):
        make_shards(tmp_path / "src", tmp_path / "out", holdout=0.1)
    assert not (tmp_path / "out").exists()


def test_tables_of_several_splits_stay_apart(tmp_path):
    for split in ("train", "val"):
        pairs(tmp_path / "src" / split, 8, text=split + " {}")
    made = make_shards(tmp_path / "src", tmp_path / "out")
    assert made.samples == {"train": 8, "val": 8}
    assert all(
        c[0].startswith("val ") for c in build_eval_dataset(str(tmp_path / "out" / "val"), image_size=16).captions
    )
    pairs(tmp_path / "src" / "more", 2)
    with pytest.raises(UserError, match=r"has 3 files captions.tsv .*keep one, or one in each of train/"):
        make_shards(tmp_path / "src", tmp_path / "out2")


def test_a_tenth_is_held_out_unless_asked_otherwise(tmp_path):
    source = pairs(tmp_path / "src", 60)
    assert make_shards(source, tmp_path / "a").samples.keys() == {"train", "val"}
    assert make_shards(source, tmp_path / "b", holdout=0).samples == {"": 60}


def test_captions_of_another_encoding_are_named_by_line_and_read_when_said(tmp_path, capsys):
    source = pairs(tmp_path / "src", 3, "latin-1", "Käfer {}")
    code, _, error = command(capsys, source, tmp_path / "out")
    assert (
        code == 2 and "captions.tsv, line 2: '0.jpg\\tKäfer 0' is not utf-8" in error and "--encoding latin-1" in error
    )
    code, out, error = command(capsys, source, tmp_path / "out", "--encoding", "latin-1", "--holdout", "0")
    assert code == 0, error
    assert sorted(build_eval_dataset(str(tmp_path / "out"), image_size=16).captions) == [
        [f"Käfer {i}"] for i in range(3)
    ]
    code, _, error = command(capsys, source, tmp_path / "x", "--encoding", "klingon")
    assert code == 2 and "there is no such encoding" in error
    pairs(tmp_path / "bom", 3, "utf-8-sig")
    assert make_shards(tmp_path / "bom", tmp_path / "bom-out", holdout=0).samples == {"": 3}


def test_equal_image_files_share_an_image_id(tmp_path):
    make_shards(pairs(tmp_path / "src", 8, same=(2, 5, 0)), tmp_path / "out", holdout=0, size=24)
    ids = {}
    for raw in read_shard(tmp_path / "out" / "00000.tar", {}):
        text = json.loads(raw.members["json"])
        ids[int(text["caption"].rpartition(" ")[2])] = text["image_id"]
    assert ids[0] == ids[2] == ids[5] and len(set(ids.values())) == 6


def recipe_of(capsys, source, out, *arguments):
    code, text, error = command(capsys, source, out, "--json", *arguments)
    assert code == 0, error
    found = json.loads(text)
    words = shlex.split(found["next"])
    return found, load_recipe(words[words.index("--config") + 1], [])


def test_pairs_come_with_a_recipe_that_fits_them(tmp_path, capsys):
    found, recipe = recipe_of(capsys, pairs(tmp_path / "my src", 60), tmp_path / "my out")
    train = found["samples"]["train"]
    assert recipe.batch.global_batch_size <= train < 2 * recipe.batch.global_batch_size
    assert (
        recipe.data.train_shards == f"{tmp_path}/my out/train"
        and recipe.eval.retrieval_shards == f"{tmp_path}/my out/val"
    )
    assert (recipe.data.group_key, recipe.loss.duplicates) == ("image_id", "mask")
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    longest = tokenizer([f"a caption of number {i}" for i in range(60)], 77).argmax(dim=1).max() + 1
    assert longest <= recipe.model.context_length < longest + 16 and recipe.train.name == "my-out"
    assert recipe.model.image_size == 32, "pictures of 40 pixels are not enlarged"
    sizes = dict(
        image_size=32, context_length=recipe.model.context_length, global_batch_size=recipe.batch.global_batch_size
    )
    batch = next(iter(build_loader(recipe.data, tokenizer=tokenizer, seed=0, **sizes)))
    assert not batch.report.bad and len(set(batch.keys.tolist())) == recipe.batch.global_batch_size


def test_labelled_images_come_with_a_recipe_that_never_trains_on_the_test_split(tmp_path, capsys):
    found, recipe = recipe_of(capsys, classes(tmp_path / "src", "test", "train"), tmp_path / "out")
    assert recipe.data.train_shards == f"{tmp_path}/out/train" and recipe.eval.zeroshot_shards == f"{tmp_path}/out/test"
    assert recipe.data.group_key is None and recipe.loss.duplicates == "mask"
    _, recipe = recipe_of(capsys, classes(tmp_path / "three", "test", "train", "val"), tmp_path / "out3")
    assert recipe.eval.zeroshot_shards == f"{tmp_path}/out3/val"


def test_a_test_split_alone_is_for_evaluation(tmp_path, capsys):
    code, text, _ = command(capsys, classes(tmp_path / "src", "test"), tmp_path / "out")
    assert code == 0 and f"--task zeroshot --data {tmp_path}/out/test" in text and "train.py" not in text
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_a_tokenizer_of_ones_own_is_used_and_a_missing_one_is_an_error_before_anything_is_written(
    demo, tmp_path, capsys
):
    source = pairs(tmp_path / "src")
    code, _, error = command(capsys, source, tmp_path / "out", "--tokenizer", "/nowhere")
    assert code == 2 and "no tokenizer at /nowhere" in error and not (tmp_path / "out").exists()
    command(capsys, source, tmp_path / "out", "--tokenizer", demo / "tokenizer")
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert written["data"]["tokenizer"] == str(demo / "tokenizer") and not (tmp_path / "out" / "tokenizer").exists()


def test_no_batch_is_larger_than_its_data():
    assert [largest_batch(n) for n in (2, 3, 8, 662, 99_999, 100_000, 5_000_000)] == [2, 2, 8, 256, 256, 1024, 4096]
