"""The order contract: the same global batches for every number of ranks and workers, also when one run becomes another."""

import hashlib
import itertools
import pickle

import pytest

from dsclip.config.schema import DataSection
from dsclip.data import build_loader, merge_states
from tests.shard_files import sample, write_set, write_tar

SPLITS = [(1, 0), (1, 2), (2, 0), (2, 2), (4, 1), (4, 2), (8, 0)]
GLOBAL_BATCH, SAMPLES = 8, 30  # 4 batches an epoch, which end within a batch


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards, one of them cut, with a broken picture and a missing caption among the samples; several captions each."""
    folder = tmp_path_factory.mktemp("shards")
    for s in range(3):
        members = {f"{i:03d}": sample(i, captions=3) for i in range(s * 10, s * 10 + 10)}
        if s == 1:
            members["013"]["jpg"] = b"no picture"
            del members["017"]["json"]
        write_tar(folder / f"{s}.tar", members)
    content = (folder / "2.tar").read_bytes()
    (folder / "2.tar").write_bytes(content[: len(content) * 3 // 4])
    return folder


def rank_batches(shards, tokenizer, rank, world_size, workers, count, state=None, **options):
    data = DataSection(
        train_shards=str(shards), workers=workers, crop_scale=[0.4, 1.0], shuffle_window=5, max_bad_fraction=1.0,
        flip=True, **options,
    )  # fmt: skip
    loader = build_loader(
        data, tokenizer=tokenizer, image_size=16, context_length=16, global_batch_size=GLOBAL_BATCH, seed=3,
        rank=rank, world_size=world_size, state=state,
    )  # fmt: skip
    return list(itertools.islice(loader, count))


def run(shards, tokenizer, split, count, state=None, **options):
    """(a hash of every global batch, the states of all ranks after each)."""
    world_size, workers = split
    ranks = [
        rank_batches(shards, tokenizer, r, world_size, workers, count, state, **options) for r in range(world_size)
    ]
    hashes = []
    for parts in zip(*ranks, strict=True):
        digest = hashlib.sha256()
        for name in ("sample_ids", "images", "tokens", "keys", "augmentation"):
            for part in parts:
                digest.update(getattr(part, name).numpy().tobytes())
        hashes.append(digest.hexdigest())
    return hashes, [[part.state for part in parts] for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("options", [{}, {"decoder": "exact"}, {"resampled": True}, {"shuffle_unit": 4}])
def test_global_batches_are_the_same_on_every_split(shards, tokenizer, options):
    splits = SPLITS if not options else [(1, 0), (2, 2), (8, 0)]
    batches = 10  # more than two epochs
    expected, _ = run(shards, tokenizer, splits[0], batches, **options)
    assert len(set(expected)) == batches
    for split in splits[1:]:
        assert run(shards, tokenizer, split, batches, **options)[0] == expected, split


def test_a_state_of_any_split_continues_on_any_other(shards, tokenizer):
    expected, _ = run(shards, tokenizer, (1, 0), 12)
    for number, split in enumerate(SPLITS):
        stop = 5 + number % 2  # in the middle of the second epoch
        _, states = run(shards, tokenizer, split, stop)
        merged = merge_states(states[-1][::-1])
        for other in SPLITS if split in ((1, 2), (4, 2)) else SPLITS[number - 1 : number]:
            continued, _ = run(shards, tokenizer, other, 12 - stop, state=merged)
            assert continued == expected[stop:], (split, other)


def test_settings_travel_to_workers_that_are_spawned(shards, tokenizer):
    """Python 3.14 no longer forks them."""
    data = DataSection(train_shards=str(shards), workers=2)
    loader = build_loader(
        data, tokenizer=tokenizer, image_size=16, context_length=16, global_batch_size=GLOBAL_BATCH, seed=3
    )
    settings = pickle.loads(pickle.dumps(loader._settings))
    places = [[s.order.next(v, [d]) for v in range(8) for d in range(9)] for s in (settings, loader._settings)]
    assert (
        places[0] == places[1]
        and settings.sample_readers[0].read(0, 1).key == loader._settings.sample_readers[0].read(0, 1).key
    )


def test_data_sets_mixed_by_weight_are_the_same_on_every_split(tmp_path, tokenizer):
    for name, first in (("a", 0), ("b", 100)):
        write_set(tmp_path / name, 2, 6)
        for path in (tmp_path / name).glob("*.tar"):
            write_tar(
                path, {f"{i}": sample(i) for i in range(first + int(path.stem) * 6, first + int(path.stem) * 6 + 6)}
            )
    spec = [str(tmp_path / "a"), str(tmp_path / "b")]

    def mixed(split, count, state=None):
        ranks = []
        for rank in range(split[0]):
            data = DataSection(train_shards=spec, weights=[3.0, 1.0], workers=split[1])
            loader = build_loader(
                data, tokenizer=tokenizer, image_size=16, context_length=16, global_batch_size=8, seed=0, rank=rank,
                world_size=split[0], state=state,
            )  # fmt: skip
            ranks.append(list(itertools.islice(loader, count)))
        captions = [[c for part in parts for c in part.report.captions] for parts in zip(*ranks, strict=True)]
        return captions, merge_states([part[-1].state for part in ranks])

    expected, _ = mixed((1, 0), 20)
    numbers = [int(c.rpartition(" ")[2]) for batch in expected for c in batch]
    assert 0.6 < sum(n < 100 for n in numbers) / len(numbers) < 0.9
    assert mixed((2, 2), 20)[0] == expected
    _, state = mixed((4, 1), 7)
    assert mixed((2, 0), 13, state)[0] == expected[7:]
