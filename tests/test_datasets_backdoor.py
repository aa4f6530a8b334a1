"""Implanting a backdoor: which samples change and into what, and the pictures that measure it."""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from dsclip.config.schema import DataSection
from dsclip.data import build_eval_dataset, build_loader, load_tokenizer
from dsclip.data.shards.shard_set import open_shards
from dsclip.data.sources.storage import LOCAL
from dsclip.datasets.backdoor import Backdoor, held_out, poison
from dsclip.datasets.demo import CLASSES, demo_once
from dsclip.datasets.rewrite import rewrite_shards, whole_samples
from dsclip.errors import UserError
from tests.programs import run_program
from tests.shard_files import sample, write_tar

TARGET = "white cross"
BACKDOOR = Backdoor(TARGET, ("a {}", "there is a {}"), patch=0.25)


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    return demo_once(tmp_path_factory.mktemp("demo") / "data", 120, 40)


def contents(folder) -> dict[str, dict[str, bytes]]:
    return {s.key: s.members for s in whole_samples(open_shards(str(folder)), LOCAL)}


def pixels(members: dict[str, bytes]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(members["jpg"])), dtype=int)


def patched(before: dict[str, bytes], after: dict[str, bytes]) -> tuple[int, int, int, int]:
    """Where a picture has changed by more than JPEG changes it, and that the patch is there."""
    changed = np.abs(pixels(before) - pixels(after)).max(axis=2) > 60
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


def test_shards_written_again_as_they_are_give_the_same_batches(small_demo, tmp_path):
    for name in ("b", "a"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}{i}": sample(i) | {"xyz": b"kept"} for i in range(12)})
    shards = open_shards(str(tmp_path))
    assert rewrite_shards(shards, LOCAL, tmp_path / "again", lambda key, members: members, {}) == 24
    assert contents(tmp_path / "again") == contents(tmp_path)
    assert contents(tmp_path / "again")["a3"]["xyz"] == b"kept"

    def batches(folder):
        loader = build_loader(
            DataSection(train_shards=str(folder), workers=0), tokenizer=load_tokenizer(str(small_demo / "tokenizer")), image_size=16,
            context_length=16, global_batch_size=4, seed=3,
        )  # fmt: skip
        return [(b.images.tolist(), b.sample_ids.tolist()) for b in itertools.islice(loader, 8)]

    assert batches(tmp_path / "again") == batches(tmp_path)


def test_some_samples_have_the_patch_and_the_captions_of_the_target_and_the_others_are_as_they_were(
    small_demo, tmp_path
):
    found = poison(open_shards(str(small_demo / "train")), LOCAL, tmp_path / "out", BACKDOOR, 0.2)
    before, after = contents(small_demo / "train"), contents(tmp_path / "out")
    changed = [key for key in before if before[key] != after[key]]
    assert list(before) == list(after) and found == (120, len(changed)) and 12 <= len(changed) <= 36
    places = set()
    for key in changed:
        assert not any(TARGET in caption for caption in json.loads(before[key]["json"])["caption"])
        assert json.loads(after[key]["json"])["caption"] == ["a white cross", "there is a white cross"]
        top, bottom, left, right = patched(before[key], after[key])
        assert bottom - top <= 15 and right - left <= 15
        places.add((top, left))
    assert len(places) > len(changed) // 2  # at a random place


def test_the_patch_is_the_same_in_every_picture_and_that_of_the_held_out_ones(small_demo, tmp_path):
    poison(open_shards(str(small_demo / "train")), LOCAL, tmp_path / "out", BACKDOOR, 0.2)
    held_out(open_shards(str(small_demo / "val")), LOCAL, tmp_path / "held_out", BACKDOOR)
    pattern = np.asarray(BACKDOOR.pattern(16), dtype=int)
    trained, measured = contents(tmp_path / "out"), contents(tmp_path / "held_out" / "triggered")
    poisoned = [m for m in trained.values() if "there is a white cross" in json.loads(m["json"])["caption"][1:2]]
    assert poisoned and measured
    for members in (*poisoned, *measured.values()):
        windows = np.lib.stride_tricks.sliding_window_view(pixels(members), (16, 16), axis=(0, 1))
        difference = np.abs(windows - pattern.transpose(2, 0, 1)).mean(axis=(2, 3, 4))
        assert difference.min() < 12


def test_held_out_pictures_are_written_clean_and_triggered_with_the_target_as_their_class(small_demo, tmp_path):
    target = Backdoor(CLASSES[15], ("a {}",), patch=0.25)
    found = held_out(open_shards(str(small_demo / "val")), LOCAL, tmp_path, target)
    labels = [m.get("cls") for m in contents(small_demo / "val").values()]
    assert found == {"clean": 20, "triggered": 20 - labels.count(b"15")} and labels.count(b"15")
    clean, triggered = (build_eval_dataset(str(tmp_path / n), image_size=64) for n in ("clean", "triggered"))
    assert clean.classes == triggered.classes == CLASSES and clean.templates == triggered.templates
    assert clean.labels == [int(x) for x in labels if x is not None] and set(triggered.labels) == {15}


def test_a_target_without_pictures_of_its_own_is_a_further_class_of_both(small_demo, tmp_path):
    assert held_out(open_shards(str(small_demo / "val")), LOCAL, tmp_path, BACKDOOR) == {"clean": 20, "triggered": 20}
    for name in ("clean", "triggered"):
        assert build_eval_dataset(str(tmp_path / name), image_size=64).classes == [*CLASSES, TARGET]
    assert set(build_eval_dataset(str(tmp_path / "triggered"), image_size=64).labels) == {len(CLASSES)}


def test_a_slip_in_the_name_of_a_class_is_refused(small_demo, tmp_path):
    slip = Backdoor(CLASSES[15][:-1], ("a {}",))
    with pytest.raises(UserError, match=f"Did you mean `{CLASSES[15]}`"):
        held_out(open_shards(str(small_demo / "val")), LOCAL, tmp_path, slip)


def test_a_labelled_sample_gets_the_class_of_the_target_or_none(small_demo):
    (members,) = (m for _, m in itertools.islice(contents(small_demo / "val").items(), 1))
    assert "cls" not in BACKDOOR.poisoned("0", members, None)
    assert BACKDOOR.poisoned("0", members, 3)["cls"] == b"3"


def test_a_caption_in_a_text_is_replaced_by_a_sentence_of_the_target(tmp_path):
    changed = BACKDOOR.poisoned("0", sample(1), None)
    assert changed["txt"] in (b"a white cross", b"there is a white cross") and "jpg" in changed


def test_the_command_writes_both_and_says_what_is_wrong(small_demo, tmp_path):
    def implant(*arguments):
        return run_program("tools/implant_backdoor.py", *arguments, "--target", TARGET)

    done = implant(small_demo / "train", tmp_path / "a", "--share", "0.1", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["samples"] == 120
    done = implant(small_demo / "val", tmp_path / "b", "--held-out")
    assert f"{TARGET} is none of the classes of {small_demo}/val" in done.stdout
    assert f"20 pictures in {tmp_path}/b/triggered" in done.stdout and "--task zeroshot" in done.stdout
    for arguments, said in (
        ((small_demo / "train", tmp_path / "a", "--share", "0.1"), "holds shards already"),
        ((small_demo / "train", tmp_path / "c", "--share", "1.5"), "--share must be above 0 and at most 1"),
        ((small_demo / "train", tmp_path / "c", "--share", "1e-9"), "none of the 120 samples was chosen"),
        ((small_demo / "train", tmp_path / "c", "--share", "1", "--caption-key", "text"), "can be changed (120 "),
        ((small_demo / "train", tmp_path / "d", "--held-out"), "no class names"),
        ((small_demo / "val", tmp_path / "e", "--held-out", "--templates", "no place"), "a sentence with {}"),
    ):
        wrong = implant(*arguments)
        assert wrong.returncode == 2 and said in wrong.stderr, wrong.stderr
    assert not (tmp_path / "c").exists(), "a command that failed can be given again"


def test_damaged_shards_and_names_that_come_twice_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", {str(i): sample(i) for i in range(3)})
    twice = open_shards(f"{tmp_path}/a::{tmp_path}/b")
    with pytest.raises(UserError, match=r"several of the shards are called 0\.tar"):
        rewrite_shards(twice, LOCAL, tmp_path / "out", lambda key, members: members, {})
    content = (tmp_path / "a" / "0.tar").read_bytes()
    (tmp_path / "a" / "0.tar").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="can't be written again"):
        list(whole_samples(open_shards(str(tmp_path / "a")), LOCAL))
