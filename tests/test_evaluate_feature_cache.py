"""Cached features: found again by what they depend on, on all ranks alike, within a bound, and never believed when damaged."""

import os

import pytest
import torch

from dsclip.data import build_eval_dataset
from dsclip.evaluate import Embedder, run_task
from dsclip.evaluate.feature_cache import SUFFIX, FeatureCache
from tests.shard_files import jpeg
from tests.test_data_evaluation_dataset import OPTIONS, encode_image, encode_text, tokenize, write
from tests.thread_ranks import ThreadRanks


class Counting:
    """An encoder that counts its calls."""

    def __init__(self, encoder):
        self.encoder, self.calls = encoder, 0

    def __call__(self, batch):
        self.calls += 1
        return self.encoder(batch)


def measured(group, spec, folder, model="weights", tasks=("retrieval", "zeroshot", "retrieval"), most_bytes=1 << 30):
    """(metrics of the tasks, image batches, text batches, whether something was found, bad samples) of a process of its own."""
    images, texts = Counting(encode_image), Counting(encode_text)
    cache = FeatureCache(model, group, folder, most_bytes)
    embedder = Embedder(images, texts, tokenize, group, store=cache, **OPTIONS)
    dataset = build_eval_dataset(str(spec), image_size=16)
    metrics = [run_task(task, embedder, dataset).metrics for task in tasks]
    return metrics, images.calls, texts.calls, cache.found, dict(dataset.bad)


@pytest.mark.parametrize("ranks", [1, 2])
def test_images_of_several_tasks_are_embedded_once_also_by_another_process(tmp_path, ranks):
    write(tmp_path / "set", broken=(3,))
    plain = measured_without_cache(tmp_path / "set")
    for attempt in range(2):
        for metrics, images, texts, found, bad in ThreadRanks(ranks).run(
            lambda group: measured(group, tmp_path / "set", tmp_path / "cache")
        ):
            assert metrics == plain and bad == {"undecodable image": 1}
            batches, prompts = -(-20 // 3), -(-40 // 3) + 2
            expected = (-(-batches // ranks), 1) if attempt == 0 else (0, 0)
            assert images == expected[0] and (texts > 0) == expected[1] and texts <= prompts
            assert found == (3 if attempt == 0 else 6)


def measured_without_cache(spec):
    from dsclip.losses import SingleRank

    embedder = Embedder(encode_image, encode_text, tokenize, SingleRank(), **OPTIONS)
    dataset = build_eval_dataset(str(spec), image_size=16)
    return [run_task(task, embedder, dataset).metrics for task in ("retrieval", "zeroshot", "retrieval")]


def single(*arguments, **options):
    return ThreadRanks(1).run(lambda group: measured(group, *arguments, **options))[0]


def test_other_weights_images_or_texts_are_not_found(tmp_path):
    spec, cache = write(tmp_path / "set"), tmp_path / "cache"
    assert single(spec, cache, tasks=["zeroshot"])[1] == 7
    assert single(spec, cache, tasks=["zeroshot"])[1] == 0
    assert single(spec, cache, model="other", tasks=["zeroshot"])[1] == 7
    (tmp_path / "folder" / "a").mkdir(parents=True)
    for i in range(4):
        (tmp_path / "folder" / "a" / f"{i}.jpg").write_bytes(jpeg(i))
    folder = tmp_path / "folder"
    assert single(folder, cache, tasks=["zeroshot"])[1] == 2
    assert single(folder, cache, tasks=["zeroshot"])[1] == 0
    os.utime(folder / "a" / "2.jpg", (1, 1))
    assert single(folder, cache, tasks=["zeroshot"])[1] == 2, "a file that was written again"


def test_a_damaged_file_is_computed_again(tmp_path):
    spec, cache = write(tmp_path / "set"), tmp_path / "cache"
    first = single(spec, cache)
    for file in cache.glob("*" + SUFFIX):
        file.write_bytes(file.read_bytes()[:50])
    again = single(spec, cache)
    assert again[0] == first[0] and again[1] == 7 and single(spec, cache)[1] == 0


def test_files_used_longest_ago_give_way(tmp_path):
    cache = FeatureCache("m", ThreadRanks(1).run(lambda group: group)[0], tmp_path, most_bytes=10_000)
    size = 1000  # floats: two files fit
    for name in ("a", "b"):
        cache.texts([name], lambda: torch.zeros(size))
    os.utime(tmp_path / (cache.key_of_texts(["a"]) + SUFFIX), (1, 1))
    cache.texts(["c"], lambda: torch.zeros(size))
    assert not (tmp_path / (cache.key_of_texts(["a"]) + SUFFIX)).exists()
    assert {p.name for p in tmp_path.iterdir()} == {cache.key_of_texts([n]) + SUFFIX for n in "bc"}
    cache.texts(["d"], lambda: torch.zeros(10 * size))
    assert not (tmp_path / (cache.key_of_texts(["d"]) + SUFFIX)).exists(), "larger than all may be"
