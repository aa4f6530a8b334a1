"""Evaluation sets: opened without their images, decoded on the rank that embeds them, never out of step."""

import io
import json
import tarfile
from collections import Counter

import pytest
import torch

from dsclip.bench import evaluation_clip_benchmark, evaluation_peer
from dsclip.bench.evaluation import measure, write_small_images
from dsclip.data import ShardWriter, build_eval_dataset
from dsclip.data.decoding.sample import IMAGE_EXTENSIONS
from dsclip.data.evaluation import texts
from dsclip.data.evaluation.texts import read_texts
from dsclip.data.reading.samples import read_shard
from dsclip.data.sources.storage import Storage
from dsclip.errors import UserError
from dsclip.evaluate import IN_TRAINING, Embedder, run_task
from dsclip.losses import SingleRank
from tests.http_shards import serve
from tests.shard_files import jpeg, write_tar
from tests.thread_ranks import ThreadRanks

OPTIONS = dict(context_length=8, batch_size=3)
SAMPLES = 20


def members(index: int) -> dict[str, bytes]:
    text = {"caption": [f"caption {index}", f"again {index}"], "negatives": [f"wrong {index}"]}
    return {"jpg": jpeg(index), "json": json.dumps(text).encode(), "cls": str(index % 5).encode()}


def write(folder, broken=(), without=()):
    with ShardWriter(folder, 6, classes=[f"c{i}" for i in range(5)], templates=["a {}"]) as writer:
        for i in range(SAMPLES):
            if i not in without:
                writer.write(f"{i:04d}", members(i) | ({"jpg": jpeg(i)[:200]} if i in broken else {}))
    return str(folder)


def encode_image(images):
    flat = images.flatten(1).float() / 255 - 0.5
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(flat @ torch.randn(flat.shape[1], 8, generator=generator), dim=1)


def encode_text(tokens):
    return torch.nn.functional.normalize(tokens.float().sin(), dim=1)


def tokenize(captions, length):
    return torch.tensor([[hash_of(c) * (k + 1) % 97 for k in range(length)] for c in captions])


def hash_of(text: str) -> int:
    return sum((i + 1) * b for i, b in enumerate(text.encode()))


def results(dataset, group) -> list[dict]:
    embedder = Embedder(encode_image, encode_text, tokenize, group, **OPTIONS)
    return [run_task(task, embedder, dataset).metrics for task in IN_TRAINING]


def test_opening_reads_no_image(tmp_path):
    dataset = build_eval_dataset(write(tmp_path, broken=range(SAMPLES)), image_size=16)
    assert len(dataset) == SAMPLES and not dataset.bad
    assert dataset.captions is dataset.captions and dataset.labels is dataset.labels, "not built anew for each sample"
    assert dataset.captions[3] == ["caption 3", "again 3"] and dataset.negatives[3] == ["wrong 3"]
    assert dataset.labels == [i % 5 for i in range(SAMPLES)] and dataset.classes[4] == "c4"


@pytest.mark.parametrize("ranks", [1, 3])
def test_broken_images_are_left_out_and_counted_on_every_rank(tmp_path, ranks):
    """As if they had never been in the set; three of them are a whole batch."""
    broken = (2, 6, 7, 8, 19)
    whole = results(build_eval_dataset(write(tmp_path / "a", without=broken), image_size=16), SingleRank())
    write(tmp_path / "b", broken=broken)

    def rank(group):
        dataset = build_eval_dataset(str(tmp_path / "b"), image_size=16)
        return results(dataset, group), dict(dataset.bad)

    for found, bad in ThreadRanks(ranks).run(rank):
        assert found == whole and whole[1]["images"] == SAMPLES - 5
        assert bad == {"undecodable image": 5}, "counted once, though three tasks met them"


def test_a_shard_that_one_rank_loses_is_left_out_by_all(tmp_path):
    write(tmp_path / "0")
    write(tmp_path / "1")

    def rank(group):
        dataset = build_eval_dataset(str(tmp_path / str(group.rank)), image_size=16)
        if group.rank == 1:
            (tmp_path / "1" / "00001.tar").unlink()
        return results(dataset, group)[1], dict(dataset.bad), set(dataset.broken)

    first, second = ThreadRanks(2).run(rank)
    assert first == second
    metrics, bad, _ = first
    assert metrics["images"] + bad["unreadable shard"] == SAMPLES and bad["unreadable shard"] == 3


def test_a_set_without_a_whole_image_is_a_sentence(tmp_path):
    dataset = build_eval_dataset(write(tmp_path, broken=range(SAMPLES)), image_size=16)
    with pytest.raises(UserError, match=r"none of the 20 images can be used \(undecodable image\)"):
        results(dataset, SingleRank())


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("side", [16, 400])  # small samples are read whole, large ones from header to header
def test_texts_are_those_that_training_reads(tmp_path, form, side):
    keys = ["a", "b/c", "x" * 110, "Zürich", "e" * 98, "folder.1/f", "last"]
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for number, key in enumerate(keys):
            if form == tarfile.USTAR_FORMAT and len(key) > 90:
                key = "g/" * 60 + key[:5]
            names = {
                "JPG": jpeg(number, side, "BMP"),
                "neg.txt": b"n",
                "json": b"{}",
                "other": b"?",
                "txt": b"t" * 5000,
            }
            for extension, content in names.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)

                tar.addfile(info, io.BytesIO(content))
    bad, ours = {}, []
    content = path.read_bytes()
    for found in read_texts(str(path), Counter()):
        image = {found.extension: content[found.start : found.start + found.size]}
        ours.append((found.raw.key, found.raw.members | image))
    expected = [(raw.key, raw.members) for raw in read_shard(str(path), bad)]
    assert ours == expected and len(ours) == len(keys) and not bad
    assert all(any(e in m for e in IMAGE_EXTENSIONS) for _, m in ours)


ALIKE = [
    f"{key}.{extension}" for key in ("a", "b/c", "d.1/e", "f" * 80) for extension in ("txt", "jpg", "neg.txt", "PNG")
]


@pytest.mark.parametrize(
    "names, alike",
    [
        (ALIKE, True),
        (ALIKE[:8] + ["g.png", "g.jpg", "g.txt", "g.neg.txt"], False),  # another order
        (ALIKE[:8] + ["g.txt", "g.jpg", "g.neg.txt", "g.png"], False),  # one extension in small letters
        (ALIKE[:8] + ["g.txt", "g.jpg"], False),
        (ALIKE[:8] + ["g.txt", "g.jpg", "g.neg.txt", "README"], False),
        (ALIKE[:8] + ["g.txt", "g.jpg", "g.neg.txt", "h" * 90 + ".PNG"], False),  # a sample of its own
        (["a.txt", "a.jpg", "a.jpg", "b.txt", "b.jpg", "b.jpg"], True),  # the last one counts
        (["a.jpg", "a\0.neg.txt", "a.txt", "b.jpg", "b.neg.txt", "b.txt"], False),  # a name ends at its first zero
        (["a.txt", "a.neg.txt", "b.txt", "b.neg.txt"], True),  # no image
        (["a.jpg", "b.jpg"], True),  # no text
        ([".jpg", "a/.jpg"], True),
    ],
)
@pytest.mark.parametrize("bytes_each", [600, 200_000])
def test_samples_of_equal_members_are_those_that_training_reads(tmp_path, monkeypatch, names, alike, bytes_each):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = bytes_each + number
            tar.addfile(info, io.BytesIO(bytes([65 + number]) * info.size))
    together = []
    monkeypatch.setattr(texts, "_samples_alike", _noted(texts._samples_alike, together))
    content, bad = path.read_bytes(), Counter()
    found = {
        s.raw.key: s.raw.members | {s.extension: content[s.start : s.start + s.size]}
        for s in read_texts(str(path), bad)
    }
    expected = {raw.key: raw.members for raw in read_shard(str(path), {})}
    with_image = {key: of_it for key, of_it in expected.items() if any(e in of_it for e in IMAGE_EXTENSIONS)}
    assert found.keys() == with_image.keys() and bool(together) == alike
    for key, of_it in found.items():  # of several images the one that counts
        assert of_it.items() <= with_image[key].items()
        assert {e for e in with_image[key] if e not in IMAGE_EXTENSIONS} <= of_it.keys()
        assert next(e for e in IMAGE_EXTENSIONS if e in with_image[key]) in of_it
    assert bad["no image"] == len(expected) - len(with_image)


def _noted(function, calls):
    """The function, which notes that it was called."""

    def noted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return noted


def test_an_index_of_other_bytes_is_not_believed(tmp_path):
    write(tmp_path / "a")
    shard = tmp_path / "a" / "00000.tar"
    write_tar(shard, {f"{i}": members(i) for i in range(2)})
    (tmp_path / "a" / "manifest.json").unlink()
    assert len(build_eval_dataset(str(shard), image_size=16)) == 2


def test_samples_without_an_image_are_counted_when_the_set_is_opened(tmp_path):
    write_tar(tmp_path / "0.tar", {"a": {"txt": b"a"}, "b": members(1), "c": {"jpg": jpeg(1)}})
    dataset = build_eval_dataset(str(tmp_path), image_size=16)
    assert len(dataset) == 1 and dict(dataset.bad) == {"no image": 1, "no caption": 1}


def test_the_bench_opens_the_set_it_wrote(tmp_path):
    write_small_images(tmp_path, 300)
    found = measure(str(tmp_path), image_size=32, decode=50)
    assert found["samples"] == 300 and 0 < found["open_s"] <= found["first_image_s"]
    assert found["images_per_second"] > 0


def test_a_copy_of_a_remote_shard_that_gave_way_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DSCLIP_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "set")
    with serve(tmp_path / "set") as (_, address, host):
        dataset = build_eval_dataset(f"{address}/manifest.json", image_size=16, storage=Storage((host,)))
        copies = list((tmp_path / "cache" / "shards").glob("*.tar"))
        assert len(dataset) == SAMPLES and copies
        for copy in copies:
            copy.unlink()
        assert dataset.image(0).shape == (3, 16, 16) and len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 1


@pytest.mark.parametrize("peer", ["transformers", "clip_benchmark"])
def test_both_sides_of_the_bench_beside_a_peer_run(peer, demo, tmp_path, monkeypatch):
    for name in evaluation_peer.NEEDED[peer]:
        pytest.importorskip(name, exc_type=(ImportError, RuntimeError))
    monkeypatch.setattr(evaluation_peer, "PRESET", "demo")
    monkeypatch.setattr(evaluation_peer, "IMAGE_SIZE", 64)
    evaluation_peer.write_photographs(tmp_path / "set", 12)
    evaluation_peer.write_model(tmp_path / "model")
    if peer == "clip_benchmark":
        evaluation_clip_benchmark.write_model(tmp_path)
    ours, theirs = (evaluation_peer.measure(who, str(tmp_path)) for who in ("dsclip", peer))
    assert ours["second_task_share"] == 0 < theirs["second_task_share"] and ours["cpu_s"] > 0
