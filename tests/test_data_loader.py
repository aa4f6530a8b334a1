"""The training loader on real shards: complete, split, repeatable, resumable, and not stopped by broken samples."""

import hashlib
import itertools
import json
import os
import pickle
from collections import Counter

import pytest
import torch

from dsclip.config.objective_section import ViewSection
from dsclip.config.schema import DataSection
from dsclip.data import build_eval_dataset, build_loader, merge_states
from dsclip.data.decoding.augment import IDENTITY
from dsclip.data.reading import slots
from dsclip.errors import UserError
from tests.shard_files import jpeg, sample, write_set, write_tar


def loader(
    shards, tokenizer, *, batch=8, rank=0, world_size=1, state=None, seed=0, hard_negatives=False, views=(), **data
):
    section = DataSection(**{"train_shards": str(shards), "shuffle_window": 20, "workers": 0, **data})
    return build_loader(
        section, tokenizer=tokenizer, image_size=16, context_length=16, global_batch_size=batch * world_size, seed=seed,
        rank=rank, world_size=world_size, hard_negatives=hard_negatives, state=state,
        views=tuple(ViewSection(v) if isinstance(v, str) else v for v in views),
    )  # fmt: skip


def take(batches, count):
    return list(itertools.islice(batches, count))


def fingerprint(batch) -> str:
    parts = (
        batch.images.numpy().tobytes(),
        batch.tokens.numpy().tobytes(),
        batch.sample_ids.numpy().tobytes(),
    )
    return hashlib.sha256(b"".join(parts)).hexdigest()


def numbers(batches) -> list[int]:
    return [int(caption.rpartition(" ")[2]) for batch in batches for caption in batch.report.captions]


def test_batches_have_the_promised_shapes(tmp_path, tokenizer):
    (batch,) = take(loader(write_set(tmp_path, 2, 20), tokenizer), 1)
    assert batch.images.shape == (8, 3, 16, 16) and str(batch.images.dtype) == "torch.uint8"
    assert batch.tokens.shape == (8, 16) and str(batch.tokens.dtype) == "torch.int64"
    assert len(set(batch.sample_ids.tolist())) == 8 and len(batch.report.captions) == 8


@pytest.mark.parametrize("shards, world_size", [(8, 4), (2, 4)])
def test_an_epoch_shows_every_sample_once_over_all_ranks(tmp_path, tokenizer, shards, world_size):
    write_set(tmp_path, shards, 64 // shards)
    seen = [
        n
        for rank in range(world_size)
        for n in numbers(take(loader(tmp_path, tokenizer, rank=rank, world_size=world_size), 2))
    ]
    assert sorted(seen) == list(range(64))


def test_order_follows_the_seed_and_changes_with_the_epoch(tmp_path, tokenizer):
    write_set(tmp_path, 4, 16)
    first, second = numbers(take(loader(tmp_path, tokenizer), 8)), numbers(take(loader(tmp_path, tokenizer, seed=1), 8))
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second
    epochs = numbers(take(loader(tmp_path, tokenizer), 16))
    assert epochs[:64] == first and epochs[64:] != first and sorted(epochs[64:]) == list(range(64))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 9])
def test_a_resumed_loader_gives_exactly_the_next_batches(tmp_path, tokenizer, workers, stop):
    """64 samples in batches of 8: 9 batches cross the border of an epoch. Every 9th image is broken."""
    for s in range(4):
        broken = {
            f"{i:05d}": sample(i, 3) | ({"jpg": b"no image"} if i % 9 == 0 else {}) for i in range(s * 16, s * 16 + 16)
        }
        write_tar(tmp_path / f"{s}.tar", broken)
    options = dict(workers=workers, max_bad_fraction=0.5)
    whole = take(loader(tmp_path, tokenizer, **options), stop + 8)
    resumed = take(loader(tmp_path, tokenizer, state=whole[stop - 1].state, **options), 8)
    assert [fingerprint(b) for b in resumed] == [fingerprint(b) for b in whole[stop:]]
    assert [b.state for b in resumed] == [b.state for b in whole[stop:]]


def test_captions_and_crops_vary_between_epochs(tmp_path, tokenizer):
    write_set(tmp_path, 1, 8, captions=3)
    first, second = take(loader(tmp_path, tokenizer, crop_scale=[0.3, 1.0]), 2)
    captions = [dict(zip(b.sample_ids.tolist(), b.report.captions, strict=True)) for b in (first, second)]
    assert captions[0].keys() == captions[1].keys() and captions[0] != captions[1]
    assert {hashlib.sha256(i.numpy().tobytes()).digest() for i in first.images}.isdisjoint(
        {hashlib.sha256(i.numpy().tobytes()).digest() for i in second.images}
    )


@pytest.mark.parametrize("change", [{"batch": 4}, {"seed": 3}, {"shuffle_window": 7}, {"resampled": True}])
def test_another_order_is_refused_on_resume(tmp_path, tokenizer, change):
    state = take(loader(write_set(tmp_path, 2, 16), tokenizer), 1)[0].state
    with pytest.raises(UserError, match="not that of the checkpoint"):
        loader(tmp_path, tokenizer, state=state, **change)


def test_a_state_of_an_earlier_version_is_refused():
    with pytest.raises(UserError, match="earlier version"):
        merge_states([{"batches": 3, "streams": [{"epoch": 0, "drawn": 24}]}])


def test_other_shards_are_refused_on_resume(tmp_path, tokenizer):
    state = take(loader(write_set(tmp_path, 2, 16), tokenizer), 1)[0].state
    write_set(tmp_path, 3, 16)
    with pytest.raises(UserError, match="the shards changed"):
        loader(tmp_path, tokenizer, state=state)


def test_bad_samples_are_skipped_and_counted_by_reason(tmp_path, tokenizer):
    good = {f"{i:05d}": sample(i) for i in range(30)}
    bad = {
        "b1": {"jpg": b"this is text", "txt": b"a"}, "b2": {"jpg": jpeg(1)}, "b3": {"txt": b"no picture"},
        "b4": {"jpg": jpeg(2), "txt": b"  \n"}, "b5": {"jpg": jpeg(3), "json": b"{"}, "b6": {"jpg": jpeg(4)[:200], "txt": b"a"},
        "b7": {"png": jpeg(5, 100, "PNG"), "txt": b"many pixels"}, "b8": {"jpg": jpeg(6), "txt": b"\xff\xfe"},
    }  # fmt: skip
    write_tar(tmp_path / "a.tar", {**dict(list(good.items())[:10]), **bad, **dict(list(good.items())[10:])})
    for decoder in ("fast", "exact"):
        options = dict(batch=1, max_image_pixels=5000, decoder=decoder, max_bad_fraction=1.0)
        found = take(loader(tmp_path, tokenizer, **options), 90)
        assert all(sorted(numbers(found[i : i + 30])) == list(range(30)) for i in (0, 30, 60))
        counts, read = Counter(), 0
        for batch in found:
            counts.update(batch.report.bad)
            read += batch.report.read
        assert read == 90 + counts.total() and 2 * 8 <= counts.total() <= 3 * 8
        assert counts.keys() == {
            "undecodable image", "no caption", "no image", "empty caption", "unreadable caption", "too many pixels"
        }  # fmt: skip


def test_too_many_bad_samples_stop_the_run_and_name_the_shard(tmp_path, tokenizer):
    members = {f"{i:05d}": sample(i) if i % 2 else {"jpg": b"x", "txt": b"a"} for i in range(300)}
    write_tar(tmp_path / "broken.tar", members)
    with pytest.raises(UserError, match=r"more than data.max_bad_fraction 0.1.*broken.tar"):
        take(loader(tmp_path, tokenizer), 60)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_without_a_usable_sample_stop_the_run(tmp_path, tokenizer, workers):
    write_tar(tmp_path / "a.tar", {f"{i}": {"jpg": b"text", "txt": b"a"} for i in range(5)})
    with pytest.raises(UserError, match="none is usable"):
        take(loader(tmp_path, tokenizer, workers=workers), 1)


def test_an_empty_shard_is_counted_and_the_others_are_read(tmp_path, tokenizer):
    write_set(tmp_path, 2, 16)
    (tmp_path / "999.tar").write_bytes(b"")
    made = loader(tmp_path, tokenizer)
    batches = take(made, 8)
    lost = "only its first 0 samples are used: it can't be read beyond byte 0 of 0"
    assert made.damaged == {f"{tmp_path.name}/999.tar": lost}
    assert [e for b in batches for e in b.report.journal] == [
        {"shard": f"{tmp_path.name}/999.tar", "what": "damaged", "detail": lost}
    ]
    assert sorted(numbers(batches[:4])) == list(range(32))
    assert sum(b.report.bad.get("damaged shard", 0) for b in batches) == 1


@pytest.mark.parametrize("cut", range(0, 9))
def test_a_truncated_shard_never_pairs_an_image_with_another_caption(tmp_path, tokenizer, cut):
    """Keys restart in every shard, so a half sample at the end of one could absorb the next one's caption."""
    for s in range(3):
        write_tar(tmp_path / f"{s}.tar", {f"{i:03d}": sample(s * 100 + i) for i in range(6)})
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[: 512 * (8 + cut) + (cut % 3) * 100])
    dataset = build_eval_dataset(str(tmp_path), image_size=32)
    originals = {i: build_one(tmp_path / "x", i) for i in [*range(6), *range(100, 106), *range(200, 206)]}
    assert 12 <= len(dataset) < 18
    assert dataset.bad["damaged shard"] == 1
    for i in range(len(dataset)):
        number = int(dataset[i]["captions"][0].rpartition(" ")[2])
        assert (dataset[i]["image"] == originals[number]).all()


def build_one(folder, number):
    folder.mkdir(exist_ok=True)
    path = folder / f"{number}.tar"
    if not path.exists():
        write_tar(path, {"000": sample(number)})
    return build_eval_dataset(str(path), image_size=32)[0]["image"]


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickles_in_a_shard_are_never_opened(tmp_path, tokenizer):
    payload = pickle.dumps(Payload(tmp_path / "executed"))
    extras = {extension: payload for extension in ("pyd", "pkl", "pickle", "pth", "npy")}
    write_tar(tmp_path / "a.tar", {f"{i:03d}": sample(i) | extras for i in range(8)})
    assert sorted(numbers(take(loader(tmp_path, tokenizer), 1))) == list(range(8))
    assert not (tmp_path / "executed").exists()


def test_too_little_shared_memory_is_said_before_workers_crash(tmp_path, tokenizer, monkeypatch):
    """Containers have 64 MB of it unless told otherwise, and a worker that writes beyond dies of SIGBUS."""
    monkeypatch.setattr(slots, "_shared_memory_bytes", lambda: 10_000)
    with pytest.raises(UserError, match="--shm-size"):
        take(loader(write_set(tmp_path, 2, 16), tokenizer, workers=2), 1)


def test_missing_shards_are_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no file matches"):
        loader(tmp_path / "*.tar", tokenizer)
    with pytest.raises(UserError, match="shard .*01.tar does not exist"):
        write_tar(tmp_path / "00.tar", {"0": sample(0)})
        loader(tmp_path / "{00..01}.tar", tokenizer)
    with pytest.raises(UserError, match="holds no .tar shards"):
        (tmp_path / "empty").mkdir()
        loader(tmp_path / "empty", tokenizer)


@pytest.mark.parametrize("spec", ["pipe:touch X; cat a.tar", "file:a.tar", "hf://x/a.tar", "ftp://h/a.tar", "htgs:x"])
def test_addresses_never_reach_a_shell(spec, tokenizer):
    with pytest.raises(UserError, match="pipes are never opened"):
        loader(spec, tokenizer)


def test_a_brace_bomb_is_refused_before_it_is_expanded(tokenizer):
    with pytest.raises(UserError, match="100,000,000 shards"):
        loader("x{0..99999999}.tar", tokenizer)


def with_negatives(folder, negatives):
    """Twenty samples; negatives(i): the extra members of sample i."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tar(folder / "000.tar", {f"{i:05d}": sample(i) | negatives(i) for i in range(20)})
    return folder


def test_hard_negatives_come_from_text_members_and_json_with_their_owner(tmp_path, tokenizer):
    def members(i):
        if i % 3 == 0:
            return {"neg.txt": f"a blue circle number {i}\n\na green circle number {i}\n".encode()}
        if i % 3 == 1:
            return {
                "json": json.dumps({"caption": f"a red circle number {i}", "negatives": [f"no circle {i}"]}).encode()
            }
        return {}

    batches = loader(with_negatives(tmp_path, members), tokenizer, batch=20, hard_negatives=True)
    (batch,) = take(batches, 1)
    expected = {0: 2, 1: 1, 2: 0}
    counts = [expected[number % 3] for number in numbers([batch])]
    assert batch.hard_owner.tolist() == [row for row, count in enumerate(counts) for _ in range(count)]
    first = next(row for row, number in enumerate(numbers([batch])) if number % 3 == 0)
    sentence = f"a blue circle number {numbers([batch])[first]}"
    own = batch.hard_tokens[batch.hard_owner == first]
    assert own[0].tolist() == tokenizer([sentence], 16)[0].tolist() and len(own) == 2


def test_at_most_max_negatives_of_a_sample_are_used(tmp_path, tokenizer):
    folder = with_negatives(tmp_path, lambda i: {"neg.txt": b"one\ntwo\nthree\nfour"})
    (batch,) = take(loader(folder, tokenizer, hard_negatives=True, max_negatives=3), 1)
    assert len(batch.hard_owner) == 3 * 8


def test_hard_negatives_that_no_sample_has_are_refused(tmp_path, tokenizer):
    folder = with_negatives(tmp_path, lambda i: {})
    with pytest.raises(UserError, match="none of the first 20 samples"):
        take(loader(folder, tokenizer, hard_negatives=True), 4)


def test_keys_are_equal_for_equal_captions_or_equal_groups(tmp_path, tokenizer):
    def members(i):
        return {"json": json.dumps({"caption": f"a {'cat' if i < 10 else 'dog'} {i // 5}", "place": i % 4}).encode()}

    folder = with_negatives(tmp_path, members)
    (batch,) = take(loader(folder, tokenizer, batch=20), 1)
    by_caption = {(caption, key) for caption, key in zip(batch.report.captions, batch.keys.tolist(), strict=True)}
    assert len(by_caption) == len({key for _, key in by_caption}) == 4
    (batch,) = take(loader(folder, tokenizer, batch=20, group_key="place"), 1)
    assert len(set(batch.keys.tolist())) == 4


@pytest.mark.parametrize("decoder", ["fast", "exact"])
def test_further_views_are_other_crops_and_captions_and_leave_the_first_as_it_was(tmp_path, tokenizer, decoder):
    write_set(tmp_path, 1, 16, captions=3)
    views = ("image_2", "text_2", "text_3")
    options = dict(batch=8, crop_scale=[0.3, 0.6], flip=True, decoder=decoder)
    plain = take(loader(tmp_path, tokenizer, **options), 4)
    found = {w: take(loader(tmp_path, tokenizer, views=views, workers=w, **options), 4) for w in (0, 2)}
    for one, other, same in zip(plain, found[0], found[2], strict=True):
        assert fingerprint(one) == fingerprint(other) == fingerprint(same)
        assert (one.augmentation == other.augmentation[:, :6]).all() and other.augmentation.shape == (8, 12)
        assert list(other.views) == list(views)
        assert all((other.views[name] == same.views[name]).all() for name in views), "whoever reads the sample"
        assert not (other.views["image_2"] == other.images).flatten(1).all(1).any()
        for row in zip(other.tokens.tolist(), *(other.views[v].tolist() for v in views[1:]), strict=True):
            assert len(set(map(tuple, row))) == 3, "three captions, three views"
    first, later = found[0][0], found[0][2]  # two epochs
    order = [later.sample_ids.tolist().index(i) for i in first.sample_ids.tolist() if i in later.sample_ids.tolist()]
    rows = [i for i, x in enumerate(first.sample_ids.tolist()) if x in later.sample_ids.tolist()]
    assert rows and (first.views["image_2"][rows] != later.views["image_2"][order]).any()


@pytest.mark.parametrize("decoder", ["fast", "exact"])
def test_a_view_has_settings_of_its_own_and_the_others_stay_as_they_were(tmp_path, tokenizer, decoder):
    write_set(tmp_path, 1, 16, captions=3)
    strong = ViewSection("image_2", [0.1, 0.2], color_jitter=[0.8, 0.8, 0.8, 0.2], grayscale=0.5)
    same, doubled = ViewSection("text_2", caption="same"), ViewSection("text_3", caption="same", word_repetition=1.0)
    options = dict(batch=16, crop_scale=[1.0, 1.0], decoder=decoder)
    (plain,) = take(loader(tmp_path, tokenizer, **options), 1)
    (found,) = take(loader(tmp_path, tokenizer, views=(strong, "image_3", same, doubled), **options), 1)
    assert (found.images == plain.images).all() and (found.tokens == plain.tokens).all()
    assert (found.augmentation[:, :6] == torch.tensor(IDENTITY)).all(), "the first is not augmented, nor is the third"
    assert (found.augmentation[:, 12:] == torch.tensor(IDENTITY)).all()
    assert found.augmentation[:, 11].unique().tolist() == [0, 1] and (found.augmentation[:, 7:11] != 0).any()
    whole = (found.views["image_3"] == found.images).flatten(1).float().mean(1)
    assert (whole > (found.views["image_2"] == found.images).flatten(1).float().mean(1)).all()
    assert (found.views["text_2"] == found.tokens).all()
    ends = [(x == tokenizer.eot_token_id).int().argmax(1) for x in (found.tokens, found.views["text_3"])]
    assert (ends[1] >= ends[0]).all() and (ends[1] > ends[0]).sum() > 8, "most of 16 captions have a word twice"
