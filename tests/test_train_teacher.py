"""A teacher beside the student and one whose features are stored say the same; what doesn't fit is refused."""

import itertools
import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsclip.config import Recipe
from dsclip.config.objective_section import ObjectiveSection, TermSection
from dsclip.config.schema import DataSection, TrainSection
from dsclip.convert import export_hf
from dsclip.data import build_loader, load_tokenizer
from dsclip.data.shards.manifest import MANIFEST
from dsclip.data.sources.storage import Storage
from dsclip.datasets.demo import demo_once
from dsclip.engine.loss_inputs import LossInputs
from dsclip.engine.micro_batch import MicroBatcher
from dsclip.errors import UserError
from dsclip.evaluate import IN_TRAINING
from dsclip.model import resolve_preset
from dsclip.train.inputs import read_inputs
from dsclip.train.prefetch import on_device
from dsclip.train.teacher import STORED, find_teacher, open_teacher, stored_by
from tests.programs import run_program
from tests.test_convert import SCALE, checkpoint_of, perturbed

CPU = torch.device("cpu")
PASSES, SAMPLES, BATCH, SIZE = 2, 24, 8, 32
DRAWN = {"crop_scale": [0.5, 1.0], "flip": True, "color_jitter": [0.4, 0.4, 0.4, 0.1]}
KEYS = [f"data.{key}={json.dumps(value)}" for key, value in DRAWN.items()]


def config_of(data):
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    tokens = dict(vocab_size=tokenizer.vocab_size, eot_token_id=tokenizer.eot_token_id)
    return resolve_preset("demo", vision_layers=2, text_layers=1, image_size=SIZE, **tokens)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `data`, `teacher`, and `stored`, which tools/reinforce_shards.py wrote."""
    folder = tmp_path_factory.mktemp("teacher")
    data = demo_once(folder / "data", SAMPLES, 4)
    export_hf(checkpoint_of(perturbed(config_of(data)), data), folder / "teacher")
    done = run_program(
        "tools/reinforce_shards.py", folder / "teacher", folder / "stored", "--passes", PASSES, "--batch-size", 10, "--json",
        f"data.train_shards={data / 'train'}", f"model.image_size={SIZE}", *KEYS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "out": str(folder / "stored"),
        "samples": SAMPLES,
        "without": 0,
        "passes": PASSES,
    }
    return folder


@pytest.fixture(scope="module")
def student(place):
    return config_of(place / "data")


def reinforced(place, out, *keys, teacher="teacher", shards="data/train"):
    """What tools/reinforce_shards.py says with one pass."""
    return run_program(
        "tools/reinforce_shards.py", place / teacher, out, "--passes", 1, "--json", f"data.train_shards={shards_of(place, shards)}",
        f"model.image_size={SIZE}", *KEYS, *keys,
    )  # fmt: skip


def shards_of(place, names):
    return str(place / names) if isinstance(names, str) else [str(place / name) for name in names]


def recipe(place, teacher, shards, seed=0, **data):
    terms = [TermSection("distill", ["image", "text"])]
    section = DataSection(train_shards=shards_of(place, shards), workers=0, **{**DRAWN, **data})
    return Recipe(data=section, objective=ObjectiveSection(terms=terms, teacher=teacher), train=TrainSection(seed=seed))


def batches(place, of, count):
    passes = stored_by(of, SIZE, Storage())["passes"] if of.objective.teacher == STORED else None
    loader = build_loader(
        of.data, tokenizer=load_tokenizer(str(place / "data" / "tokenizer")), image_size=SIZE, context_length=16,
        global_batch_size=BATCH, seed=of.train.seed, taught_passes=passes,
    )  # fmt: skip
    return list(itertools.islice(on_device(iter(loader), CPU), count))


def test_what_is_stored_is_what_the_teacher_says_beside_the_student(place):
    beside = recipe(place, str(place / "teacher"), "data/train")
    teacher = open_teacher(str(place / "teacher")).load(CPU, 5)
    online = list(teacher.teach(iter(batches(place, beside, PASSES * SAMPLES // BATCH))))
    stored = batches(place, recipe(place, "stored", "stored"), PASSES * SAMPLES // BATCH)
    for one, other in zip(online, stored, strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)
        for name in ("teacher_image", "teacher_text"):
            torch.testing.assert_close(other.views[name], one.views[name], atol=2e-6, rtol=0)
            torch.testing.assert_close(other.views[name].norm(dim=1), torch.ones(BATCH))


def test_passes_beyond_the_stored_ones_show_the_crops_and_captions_that_there_are_features_of(place):
    epoch = SAMPLES // BATCH
    seen = batches(place, recipe(place, "stored", "stored"), (PASSES + 1) * epoch)
    of = lambda part: {int(s): i for b in part for s, i in zip(b.sample_ids, b.views["teacher_image"], strict=True)}  # noqa: E731
    first, second, third = (of(seen[k * epoch : (k + 1) * epoch]) for k in range(3))
    assert all(torch.equal(third[s], first[s]) for s in first) and any(
        not torch.equal(second[s], first[s]) for s in first
    )


def test_the_temperature_is_the_teachers_own_unless_one_is_given(place, student):
    for teacher, shards in ((str(place / "teacher"), "data/train"), ("stored", "stored")):
        of = recipe(place, teacher, shards)
        assert find_teacher(of, student, Storage()).temperate(of).objective.teacher_temperature == pytest.approx(
            1 / SCALE, rel=1e-5
        )
        given = replace(of, objective=replace(of.objective, teacher_temperature=0.3))
        assert find_teacher(given, student, Storage()).temperate(given).objective.teacher_temperature == 0.3


def test_features_of_other_crops_and_captions_are_refused(place, student):
    for of, said in (
        (recipe(place, "stored", "stored", seed=1), r"train\.seed=0, and this run has 1"),
        (recipe(place, "stored", "stored", flip=False), r"data\.flip=True, and this run has False"),
        (recipe(place, "stored", "data/train"), "says no teacher"),
        (recipe(place, str(place / "nowhere"), "data/train"), "`objective.teacher`: .*no such file or folder"),
    ):
        with pytest.raises(UserError, match=said):
            find_teacher(of, student, Storage())
    with pytest.raises(UserError, match="image_size=32, and this run has 64"):
        find_teacher(recipe(place, "stored", "stored"), replace(student, image_size=64), Storage())


def test_a_batch_without_the_teachers_features_is_refused(place):
    of = recipe(place, str(place / "teacher"), "data/train")
    inputs = LossInputs(of.loss, MicroBatcher(of, config_of(place / "data"), CPU, 0, 1), 16, False)
    (batch,) = batches(place, of, 1)
    with pytest.raises(UserError, match=r"needs batch.views\['teacher_image'\], 8 rows of features; it is missing"):
        inputs.teacher(batch, 3)
    wrong = replace(batch, views={"teacher_image": torch.zeros(7, 4)})
    with pytest.raises(UserError, match=r"it is torch.float32 \(7, 4\)"):
        inputs.teacher(wrong, 3)


def test_a_teacher_of_another_image_size_is_shown_resized_pictures(place):
    teacher = open_teacher(str(place / "teacher")).load(CPU, None)
    grey = torch.full((2, 3, 48, 48), 128, dtype=torch.uint8)
    image, _ = teacher.features(grey, ["a", "b"])
    same, _ = teacher.features(grey[:, :, :SIZE, :SIZE], ["a", "b"])
    torch.testing.assert_close(image, same, atol=1e-6, rtol=0)


def renamed(folder, prefix):
    """The folder, its shards called otherwise, as by hand: their manifest still lists the old names."""
    for path in list(folder.glob("*.tar")):
        path.rename(folder / f"{prefix}{path.name}")
    return folder


def copied(place, name, prefix="", change=lambda teacher: None):
    """`stored` in a folder of this name, the names of its shards after a prefix, its manifest changed."""
    folder = Path(shutil.copytree(place / "stored", place / name))
    said = json.loads((folder / MANIFEST).read_text())
    for entry in said["shards"]:
        entry["name"] = prefix + entry["name"]
    change(said["teacher"])
    (renamed(folder, prefix) / MANIFEST).write_text(json.dumps(said))
    return name


def test_folders_whose_shards_are_called_the_same_are_refused(place, student):
    both = ["stored", copied(place, "again")]
    with pytest.raises(UserError, match=r"several of the training shards are called 00000\.tar.*Rename the shards"):
        find_teacher(recipe(place, "stored", both), student, Storage())
    with pytest.raises(UserError, match=r"called 00000\.tar"):
        find_teacher(recipe(place, "stored", ["stored", "stored"]), student, Storage())
    done = reinforced(place, place / "together", shards=["data/train", "data/val"])
    assert done.returncode == 2 and "run tools/index_shards.py on their folders, and write them together" in done.stderr
    assert not (place / "together").exists()


def test_what_the_refusal_advises_is_what_the_teacher_says_beside_the_student(place):
    folder = renamed(Path(shutil.copytree(place / "data" / "val", place / "renamed")), "val")
    assert run_program("tools/index_shards.py", folder).returncode == 0
    both = ["data/train", "renamed"]
    done = reinforced(place, place / "one_set", shards=both)
    assert done.returncode == 0, done.stderr
    count = json.loads(done.stdout)["samples"] // BATCH
    teacher = open_teacher(str(place / "teacher")).load(CPU, None)
    online = list(teacher.teach(iter(batches(place, recipe(place, str(place / "teacher"), both), count))))
    for shards in both:  # one by one: with names that differ that is the same
        assert reinforced(place, place / "alone" / shards, shards=shards).returncode == 0
    for written in ("one_set", [f"alone/{shards}" for shards in both]):
        for one, other in zip(online, batches(place, recipe(place, "stored", written), count), strict=True):
            assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.images, other.images)
            torch.testing.assert_close(other.views["teacher_image"], one.views["teacher_image"], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "key, value", [("train.seed", 3), ("data.flip", False), ("passes", 1), ("width", 5), ("model", "runs/b")]
)
def test_folders_whose_manifests_say_otherwise_are_refused(place, student, key, value):
    def change(teacher):
        (teacher if key in teacher else teacher["drawn_by"])[key] = value

    other = copied(place, f"other_{key}", "b", change)
    with pytest.raises(
        UserError, match=rf"in {place / other} are with {key}={value}, and those in {place / 'stored'} "
    ):
        find_teacher(recipe(place, "stored", ["stored", other]), student, Storage())


def test_folders_that_say_the_same_are_taken_and_one_without_a_teacher_is_refused(place, student):
    alike = copied(place, "alike", "c")
    assert find_teacher(recipe(place, "stored", ["stored", alike]), student, Storage())
    renamed(Path(shutil.copytree(place / "data" / "train", place / "plain")), "d")
    with pytest.raises(UserError, match=rf"in {place / 'plain'} says no teacher"):
        find_teacher(recipe(place, "stored", ["stored", "plain"]), student, Storage())


def test_shards_that_were_renamed_since_have_no_teacher(place, student):
    folder = renamed(place / copied(place, "since"), "e")
    with pytest.raises(
        UserError, match=r"the manifest beside .*e00000\.tar says nothing of it: it was added or renamed"
    ):
        find_teacher(recipe(place, "stored", "since"), student, Storage())
    assert run_program("tools/index_shards.py", folder).returncode == 0
    with pytest.raises(UserError, match="says no teacher"):
        find_teacher(recipe(place, "stored", "since"), student, Storage())
    assert run_program("tools/index_shards.py", place / copied(place, "indexed")).returncode == 0
    assert find_teacher(recipe(place, "stored", "indexed"), student, Storage())


@pytest.mark.parametrize("teacher", ["stored", "beside"])
def test_a_width_that_does_not_fit_is_refused_before_the_run_has_a_folder(place, student, tmp_path, teacher):
    keys = [
        "objective.terms=[{name: distill_features, between: [image.projector]}]",
        "objective.heads=[{name: projector, kind: projector, of: image, width: 8}]",
        f"objective.teacher={'stored' if teacher == 'stored' else place / 'teacher'}",
        f"data.train_shards={place / 'stored'}", f"data.tokenizer={place / 'data' / 'tokenizer'}", f"model.image_size={SIZE}",
        "batch.global_batch_size=8", *(f"eval.{task}_shards={place / 'data' / 'val'}" for task in IN_TRAINING), f"train.output={tmp_path}", *KEYS,
    ]  # fmt: skip
    with pytest.raises(
        UserError, match=f"the 8 numbers of image.projector with the teacher's {student.embed_dim}; give"
    ):
        read_inputs(Namespace(config="demo", ds_config="zero3_bf16", resume="none", overrides=keys))
    assert not list(tmp_path.iterdir())


def test_a_tool_that_finds_no_usable_sample_writes_nothing(place):
    done = reinforced(place, place / "nothing", "data.caption_key=foo")
    assert done.returncode == 2
    assert f"none of the {SAMPLES} samples (unreadable caption: {SAMPLES})" in done.stderr
    assert not (place / "nothing").exists()


def test_the_tool_names_its_argument(place):
    done = reinforced(place, place / "nothing", teacher="nowhere")
    assert done.returncode == 2
    assert "TEACHER: " in done.stderr and "objective.teacher" not in done.stderr
