"""The training loader: endless batches whose content is a function of the seed, with a position that can be resumed.

Each (rank, worker) reads its own stream: whole shards when there are enough for all streams, single samples otherwise.
A stream's position is (epoch, samples drawn); a resumed stream skips undecoded samples up to there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dsclip.config.schema import DataSection
from dsclip.data.reader import (
    BadSample,
    RawSample,
    decode_image,
    read_captions,
    read_group,
    read_negatives,
    read_shard,
)  # fmt: skip
from dsclip.data.shards import resolve_shards
from dsclip.data.tokenizer import Tokenizer
from dsclip.data.transforms import train_image
from dsclip.errors import UserError

FEWEST_TO_JUDGE = 200  # samples read before the share of bad ones can stop a run
FEWEST_WITHOUT_NEGATIVES = 1000  # samples read without any hard negative before declaring them is an error


@dataclass(frozen=True)
class StreamSettings:
    """What every stream of a rank shares."""

    shards: list[Path]
    data: DataSection
    tokenizer: Tokenizer
    image_size: int
    context_length: int
    local_batch_size: int
    seed: int
    rank: int
    world_size: int
    hard_negatives: bool = False

    @property
    def streams_a_rank(self) -> int:
        return max(1, self.data.workers)


def build_loader(
    data: DataSection,
    *,
    tokenizer: Tokenizer,
    image_size: int,
    context_length: int,
    local_batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    hard_negatives: bool = False,
    state: dict | None = None,
) -> Loader:
    """This rank's endless iterable of batches of exactly `local_batch_size` samples.

    A batch: images uint8 [n, 3, S, S], tokens int64 [n, L], sample_ids int64 [n], keys int64 [n]
    (equal for duplicates), captions (n strings), read and bad (samples read and skipped, by reason, for this batch);
    with hard_negatives also hard_tokens [m, L] and hard_owner [m], the sample of each; state (JSON: the position after this batch). Passing that
    state back continues with exactly the next batch. Raises UserError for shards that are missing or all unusable.
    """
    shards = resolve_shards(data.train_shards)
    settings = StreamSettings(
        shards, data, tokenizer, image_size, context_length, local_batch_size, seed, rank, world_size, hard_negatives
    )
    return Loader(settings, state)


class Loader:
    """Iterates over batches and keeps the positions of all streams of this rank."""

    def __init__(self, settings: StreamSettings, state: dict | None):
        self._settings = settings
        streams = settings.streams_a_rank
        state = state or {"batches": 0, "streams": [{"epoch": 0, "drawn": 0}] * streams}
        if len(state["streams"]) != streams:
            raise UserError(
                f"the checkpoint was written with data.workers={len(state['streams'])} and this run has {streams}; "
                "use the same number to continue with the next batch"
            )
        self._state = state

    def __iter__(self) -> Iterator[dict]:
        first, positions = self._state["batches"], list(self._state["streams"])
        workers = self._settings.data.workers
        dataset = _Streams(self._settings, positions, first)
        options = dict(prefetch_factor=2, persistent_workers=True, worker_init_fn=_start_worker) if workers else {}
        pin = torch.cuda.is_available()
        batches = DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=pin, **options)
        for number, batch in enumerate(batches, start=first):
            if "error" in batch:
                raise UserError(batch["error"])
            # Batch b comes from stream b mod streams: torch's loader takes workers in turn.
            positions[number % len(positions)] = batch.pop("position")
            batch["state"] = {"batches": number + 1, "streams": list(positions)}
            yield batch


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class _Streams(IterableDataset):
    """In worker w: the stream whose turn it is after `first` batches were already taken."""

    def __init__(self, settings: StreamSettings, positions: list[dict], first: int):
        self._settings, self._positions, self._first = settings, positions, first

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        index = ((worker.id if worker else 0) + self._first) % self._settings.streams_a_rank
        try:
            yield from _Stream(self._settings, index).batches(**self._positions[index])
        except UserError as error:
            yield {"error": str(error)}


class _Stream:
    """One endless, shuffled sequence of samples."""

    def __init__(self, settings: StreamSettings, index: int):
        self._s = settings
        self._part = settings.rank * settings.streams_a_rank + index
        self._parts = settings.world_size * settings.streams_a_rank
        self._whole_shards = len(settings.shards) >= self._parts
        self._damaged: dict[str, int] = {}
        self._bad_by_shard: Counter = Counter()
        self._read = 0
        self._negatives = 0

    def batches(self, epoch: int, drawn: int) -> Iterator[dict]:
        samples, skipped, read = [], Counter(), 0
        while True:
            usable, whole_pass = False, drawn == 0
            for raw in self._shuffled(epoch, skip=drawn):
                drawn, read = drawn + 1, read + 1
                try:
                    samples.append(self._prepare(raw, epoch))
                    usable = True
                except BadSample as reason:
                    skipped[str(reason)] += 1
                    self._bad_by_shard[raw.shard] += 1
                self._judge()
                if len(samples) == self._s.local_batch_size:
                    skipped.update(self._damaged)
                    self._damaged.clear()
                    yield self._batch(samples, read, dict(skipped), {"epoch": epoch, "drawn": drawn})
                    samples, skipped, read = [], Counter(), 0
            if whole_pass and not usable:
                self._refuse_unusable(skipped)
            self._judge_negatives(whole_pass)
            epoch, drawn = epoch + 1, 0

    def _shuffled(self, epoch: int, skip: int) -> Iterator[RawSample]:
        """This stream's samples of an epoch in shuffled order, the first `skip` left out."""
        rng = np.random.default_rng([self._s.seed, epoch, self._part])
        waiting: list[RawSample] = []
        for raw in self._in_order(epoch):
            waiting.append(raw)
            if len(waiting) >= self._s.data.shuffle_buffer:
                raw = _take(waiting, rng)
                if skip:
                    skip -= 1
                else:
                    yield raw
        while waiting:
            raw = _take(waiting, rng)
            if skip:
                skip -= 1
            else:
                yield raw

    def _in_order(self, epoch: int) -> Iterator[RawSample]:
        order = np.random.default_rng([self._s.seed, epoch]).permutation(len(self._s.shards))
        if self._whole_shards:
            order = order[self._part :: self._parts]
        number = 0
        for index in order:
            for raw in read_shard(self._s.shards[index], self._damaged):
                if self._whole_shards or number % self._parts == self._part:
                    yield raw
                number += 1

    def _prepare(self, raw: RawSample, epoch: int) -> tuple:
        captions = read_captions(raw, self._s.data.caption_key)
        image = decode_image(raw, self._s.data.max_image_pixels)
        rng = np.random.default_rng([self._s.seed, epoch, raw.sample_id % 2**63])
        caption = captions[int(rng.integers(len(captions)))]
        negatives = []
        if self._s.hard_negatives:
            negatives = read_negatives(raw, self._s.data.negative_key, self._s.data.max_negatives)
            self._negatives += len(negatives)
        return (
            train_image(image, self._s.image_size, self._s.data.crop_scale, self._s.data.flip, rng),
            caption,
            raw.sample_id,
            read_group(raw, self._s.data.group_key, caption),
            negatives,
        )

    def _batch(self, samples: list[tuple], read: int, bad: dict[str, int], position: dict) -> dict:
        images, captions, sample_ids, keys, negatives = zip(*samples, strict=True)
        extra = {}
        if self._s.hard_negatives:
            owners = [row for row, own in enumerate(negatives) for _ in own]
            sentences = [sentence for own in negatives for sentence in own]
            extra["hard_tokens"] = self._s.tokenizer(sentences, self._s.context_length)
            extra["hard_owner"] = torch.tensor(owners, dtype=torch.int64)
        return extra | {
            "images": torch.stack(images),
            "tokens": self._s.tokenizer(list(captions), self._s.context_length),
            "sample_ids": torch.tensor(sample_ids),
            "keys": torch.tensor(keys),
            "captions": list(captions),
            "read": read,
            "bad": bad,
            "position": position,
        }

    def _judge_negatives(self, whole_pass: bool) -> None:
        """Stops a run that declares hard negatives and has none: it would train another loss than it says."""
        if self._s.hard_negatives and not self._negatives and (whole_pass or self._read >= FEWEST_WITHOUT_NEGATIVES):
            raise UserError(
                f"rank {self._s.rank}: loss.hard_negatives is set, but none of the first {self._read} samples of stream "
                f"{self._part} has a hard negative. Give samples a .neg.txt member or a list under "
                f"`{self._s.data.negative_key}` (data.negative_key) in their .json, or set loss.hard_negatives=none."
            )

    def _judge(self) -> None:
        self._read += 1
        if self._read >= FEWEST_WITHOUT_NEGATIVES:
            self._judge_negatives(whole_pass=False)
        total_bad = self._bad_by_shard.total()
        if self._read >= FEWEST_TO_JUDGE and total_bad > self._s.data.max_bad_fraction * self._read:
            worst = ", ".join(f"{name} ({n})" for name, n in self._bad_by_shard.most_common(3))
            raise UserError(
                f"{total_bad} of {self._read} samples read can't be used, more than data.max_bad_fraction "
                f"{self._s.data.max_bad_fraction}. Most are in {worst}. Repair these shards or raise the limit."
            )

    def _refuse_unusable(self, skipped: Counter) -> None:
        reasons = (
            ", ".join(f"{n} {reason}" for reason, n in (skipped + Counter(self._damaged)).items()) or "they are empty"
        )
        names = ", ".join(str(p) for p in self._s.shards[:3]) + (" ..." if len(self._s.shards) > 3 else "")
        raise UserError(
            f"rank {self._s.rank}: a whole pass over {names} gave no usable sample for stream {self._part} of "
            f"{self._parts} ({reasons}). Check the shards; a sample needs an image and a .txt or .json caption."
        )


def _take(waiting: list[RawSample], rng: np.random.Generator) -> RawSample:
    index = int(rng.integers(len(waiting)))
    waiting[index], waiting[-1] = waiting[-1], waiting[index]
    return waiting.pop()
