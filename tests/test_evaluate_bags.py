"""Retrieval within bags, against a loop over bags, on any ranks, with what can't take part left out."""

import json
from collections import defaultdict

import pytest

from dsclip.data import ShardWriter, build_eval_dataset
from dsclip.errors import UserError
from dsclip.evaluate import Embedder, run_task
from dsclip.losses import SingleRank
from tests.shard_files import jpeg
from tests.test_data_evaluation_dataset import OPTIONS, encode_image, encode_text, tokenize
from tests.thread_ranks import ThreadRanks

BAGS = ["a", "b", "a", "a", "b", None, "c", "d", "d", "d"]  # c is alone; of d one image is broken
BROKEN = 8


def embedder(group, batch_size=3):
    return Embedder(encode_image, encode_text, tokenize, group, **OPTIONS | {"batch_size": batch_size})


def opened(folder, bags=BAGS):
    if not folder.exists():
        with ShardWriter(folder, 4) as writer:
            for i, bag in enumerate(bags):
                text = {"caption": [f"picture {i}", f"number {i}"]} | ({} if bag is None else {"bag": bag})
                image = jpeg(i)[:200] if i == BROKEN else jpeg(i)
                writer.write(f"{i:02d}", {"jpg": image, "json": json.dumps(text).encode()})
    return build_eval_dataset(str(folder), image_size=16, group_key="bag")


def test_recall_is_that_of_a_loop_over_bags(tmp_path):
    dataset = opened(tmp_path / "set")
    found = run_task("bag_retrieval", embedder(SingleRank()), dataset).metrics
    whole = [i for i, bag in enumerate(BAGS) if bag is not None and i != BROKEN]
    image, _ = embedder(SingleRank()).images(dataset, whole)
    text = {i: embedder(SingleRank()).texts(dataset.captions[i]) for i in whole}
    bags = defaultdict(list)
    for row, i in enumerate(whole):
        bags[BAGS[i]].append((row, i))
    to_image, to_text = defaultdict(list), defaultdict(list)
    for bag in bags.values():
        if len(bag) == 1:
            continue
        for row, i in bag:
            for caption in text[i]:
                best = max(bag, key=lambda other, c=caption: (float(image[other[0]] @ c), -other[0]))
                to_image[len(bag)].append(best[1] == i)
            best = max(((float(image[row] @ c), -j, j) for _, j in bag for c in text[j]))
            to_text[len(bag)].append(best[2] == i)
    for name, hits in (("text_to_image_recall@1", to_image), ("image_to_text_recall@1", to_text)):
        everything = hits[2] + hits[3]
        assert found[name] == pytest.approx(sum(everything) / len(everything))
        for size in (2, 3):
            assert found[f"{name}_bags_of_{size}"] == pytest.approx(sum(hits[size]) / len(hits[size]))
    assert (found["images"], found["captions"], found["bags"]) == (7, 14, 3)
    assert found["chance"] == pytest.approx((8 / 2 + 6 / 3) / 14)
    for other in ThreadRanks(2).run(
        lambda group: run_task("bag_retrieval", embedder(group, 2), opened(tmp_path / "set"))
    ):
        assert other.metrics == found


def test_one_bag_of_all_is_retrieval(tmp_path):
    dataset = opened(tmp_path / "set", ["same"] * 8)
    found = run_task("bag_retrieval", embedder(SingleRank()), dataset).metrics
    plain = run_task("retrieval", embedder(SingleRank()), dataset).metrics
    assert all(found[name] == plain[name] for name in ("text_to_image_recall@1", "image_to_text_recall@1"))


def test_without_groups_it_says_what_is_needed(tmp_path):
    with pytest.raises(UserError, match="two samples or more of the same group"):
        run_task("bag_retrieval", embedder(SingleRank()), opened(tmp_path / "set", [None, "a", "b"]))
