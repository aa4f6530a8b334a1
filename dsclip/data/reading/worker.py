"""One loader worker: draws samples for its streams in order, and makes its part of every global batch."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from dsclip.config.data_section import DataSection
from dsclip.config.objective_section import ViewSection
from dsclip.data.batch import LoadReport
from dsclip.data.decoding.prepare import Preparer, TrainSample, of_kind
from dsclip.data.decoding.sample import BadSample, RawSample
from dsclip.data.decoding.tokenizer import Tokenizer
from dsclip.data.order.exact import Draw, Order
from dsclip.data.order.shards import ShardOrder
from dsclip.data.reading.ahead import ReadAhead, Threads
from dsclip.data.reading.part import Part
from dsclip.data.reading.samples import SampleReader
from dsclip.data.sources.storage import SourceError, is_remote, redact
from dsclip.errors import UserError

PREFETCH = 2  # parts that torch's loader asks of a worker ahead of time
SLOTS = PREFETCH + 2  # and one that is written, and one that is read
_DAMAGE = {
    "missing sample": "fewer samples than its manifest says",
    "damaged sample": "other bytes than its index says",
}
FEWEST_TO_JUDGE = 200  # samples read before the share of bad ones can stop a run
FEWEST_WITHOUT_NEGATIVES = 1000  # samples read without any hard negative before declaring them is an error


@dataclass(frozen=True)
class Settings:
    """What all workers of a rank share. streams: [first, stop) of this rank."""

    data: DataSection
    order: Order | ShardOrder
    sample_readers: list[SampleReader]  # one a data set
    tokenizer: Tokenizer
    image_size: int
    context_length: int
    global_batch: int
    seed: int
    rank: int
    streams: tuple[int, int]
    hard_negatives: bool = False
    views: tuple[ViewSection, ...] = ()
    """The further ones of each sample, such as image_2 and text_2."""
    classes: int = 0
    """How many there are, where samples need one."""
    taught_passes: int | None = None
    """Of a teacher's features in the samples, see `Preparer`."""

    @property
    def images_per_sample(self) -> int:
        return 1 + len(of_kind("image", self.views))

    @property
    def workers(self) -> int:
        return max(1, self.data.workers)

    @property
    def quota(self) -> int:
        """Samples that a stream gives to each global batch."""
        return self.global_batch // self.order.streams


class Parts(IterableDataset[Part | UserError]):
    """In a worker: its part of every batch, that of its share of the rank's streams; what ends the run comes as a value."""

    def __init__(
        self, worker: type[Worker], settings: Settings, drawn: list[list[int]], slots: torch.Tensor | None
    ):  # fmt: skip
        self._worker, self._settings, self._drawn, self._slots = worker, settings, drawn, slots

    def __iter__(self) -> Iterator[Part | UserError]:
        worker = get_worker_info()
        number = worker.id if worker else 0
        first, stop = self._settings.streams
        share = (stop - first) // self._settings.workers
        streams = range(first + number * share, first + (number + 1) * share)
        drawn = {v: list(self._drawn[v - first]) for v in streams}
        try:
            yield from self._worker(self._settings, drawn, None if self._slots is None else self._slots[number]).parts()
        except UserError as error:
            yield error


class Worker:
    """Draws, decodes, counts. drawn: {stream: samples drawn of each data set}. slots: see `slots`."""

    def __init__(self, settings: Settings, drawn: dict[int, list[int]], slots: torch.Tensor | None = None):
        self._settings, self._drawn, self._slots = settings, drawn, slots
        self._ahead: dict[int, ReadAhead] = {}  # of data sets with remote shards
        self._bad_by_shard: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._journaled: set[tuple[str, str]] = set()
        self._journal: list[dict[str, str]] = []
        self._read = self._negatives = self._bad_in_a_row = 0
        self._prepare = Preparer(
            settings.data,
            settings.image_size,
            settings.seed,
            settings.hard_negatives,
            settings.views,
            settings.classes,
            settings.taught_passes,
        )
        self._total = sum(settings.order.set_samples)

    def parts(self) -> Iterator[Part]:
        """Endless parts of quota · streams samples each. Their images are a tensor, or the number of a slot."""
        threads = self._read_ahead()
        try:
            yield from self._parts()
        finally:
            if threads is not None:
                threads.close()

    def _read_ahead(self) -> Threads | None:
        remote = [k for k, r in enumerate(self._settings.sample_readers) if any(map(is_remote, r.shards.locations))]
        if not remote:
            return None
        threads, share = Threads(), self._settings.data.read_ahead_mb * 1_000_000 // len(remote)
        for k in remote:
            drawn = {stream: counts[k] for stream, counts in self._drawn.items()}
            self._ahead[k] = ReadAhead(
                self._settings.sample_readers[k],
                self._exact.sets[k],
                drawn,
                self._settings.quota,
                share,
                threads,
            )
        return threads

    def _parts(self) -> Iterator[Part]:
        for number in itertools.count():
            started, waited, slow = time.monotonic(), self._waited, self._prepare.slow_decoded
            samples: list[TrainSample] = []
            skipped: Counter[str] = Counter()
            read = self._read
            size, slot = self._settings.image_size, number % SLOTS
            count, each = len(self._drawn) * self._settings.quota, self._settings.images_per_sample
            if self._slots is None:
                images = torch.empty(each * count, 3, size, size, dtype=torch.uint8)
            else:
                images = self._slots[slot]
            for stream in self._drawn:
                for _ in range(self._settings.quota):
                    samples.append(self._next_good(stream, list(images[len(samples) :: count]), skipped))
            report = LoadReport(
                captions=[sample.caption for sample in samples], read=self._read - read, bad=dict(skipped), journal=self._journal,
                seconds=time.monotonic() - started, waited=self._waited - waited,
                slow_decoded=self._prepare.slow_decoded - slow,
            )  # fmt: skip
            self._journal = []
            part = self._part(images if self._slots is None else slot, samples, report)
            if number == 0:
                for ahead in self._ahead.values():
                    ahead.fill()
            yield part

    @property
    def _exact(self) -> Order:
        if not isinstance(self._settings.order, Order):
            raise TypeError("shards that are streamed need a StreamWorker")
        return self._settings.order

    @property
    def _waited(self) -> float:
        """Seconds in which this worker waited for bytes of remote shards."""
        return sum(ahead.waited_s for ahead in self._ahead.values())

    def _next_good(self, stream: int, images: list[torch.Tensor], skipped: Counter[str]) -> TrainSample:
        """The stream's next usable sample, its picture written to `images`, a view each; the others are counted."""
        while True:
            shard, round_, fetch = self._next_raw(stream)
            self._read += 1
            try:
                sample = self._prepare(fetch(), round_, *images)
            except BadSample as reason:
                skipped[str(reason)] += 1
                self._bad_by_shard[shard] += 1
                self._bad_in_a_row += 1
                self._reasons[str(reason)] += 1
                if str(reason) in _DAMAGE:
                    self._note(shard, _DAMAGE[str(reason)], str(reason))
                self._judge(skipped)
                continue
            self._bad_in_a_row = 0
            self._negatives += len(sample.hard_negatives)
            self._judge_negatives()
            return sample

    def _next_raw(self, stream: int) -> tuple[str, int, Callable[[], RawSample]]:
        """(shard, round, what reads it or raises BadSample) of the stream's next sample; counts it as drawn."""
        draw = self._exact.next(stream, self._drawn[stream])
        shard = self._settings.sample_readers[draw.data_set].shards.name(draw.shard)
        return shard, draw.round, partial(self._fetch, stream, draw)

    def _fetch(self, stream: int, draw: Draw) -> RawSample:
        reader = self._settings.sample_readers[draw.data_set]
        try:
            if not is_remote(reader.shards.locations[draw.shard]):
                return reader.read(draw.shard, draw.position)
            content, size = self._ahead[draw.data_set].take(stream, self._drawn[stream][draw.data_set] - 1)
            if isinstance(content, Exception):
                raise content
            return reader.sample(draw.shard, content, size)
        except SourceError as error:
            self._unreadable(reader.shards.name(draw.shard), error)

    def _unreadable(self, shard: str, error: SourceError) -> NoReturn:
        """A shard that can't be read after all attempts: the end of the run, or a gap that the journal tells of."""
        if self._settings.data.on_unreadable == "stop":
            raise UserError(
                f"rank {self._settings.rank}: shard {shard} can't be read ({error}). Continue later with --resume auto, or set "
                "data.on_unreadable=skip to leave out its samples."
            )
        self._note(shard, "unreadable, left out", str(error))
        raise BadSample("unreadable shard")

    def _note(self, shard: str, what: str, detail: str) -> None:
        if (shard, what) not in self._journaled:
            self._journaled.add((shard, what))
            self._journal.append({"shard": shard, "what": what, "detail": redact(detail)})

    def _part(self, images: torch.Tensor | int, samples: list[TrainSample], report: LoadReport) -> Part:
        tokenizer, length = self._settings.tokenizer, self._settings.context_length
        hard_tokens = hard_owner = augmentation = None
        if samples[0].augmentation is not None:
            augmentation = np.array([s.augmentation for s in samples], dtype=np.float32)
        if self._settings.hard_negatives:
            hard_tokens = tokenizer([sentence for s in samples for sentence in s.hard_negatives], length).numpy()
            hard_owner = np.repeat(np.arange(len(samples)), [len(s.hard_negatives) for s in samples])
        return Part(
            images=images,
            tokens=tokenizer(report.captions, length).numpy(),
            sample_ids=np.array([s.sample_id for s in samples]),
            keys=np.array([s.key for s in samples]),
            hard_tokens=hard_tokens,
            hard_owner=hard_owner,
            augmentation=augmentation,
            texts=[tokenizer(list(view), length).numpy() for view in zip(*(s.texts for s in samples), strict=True)],
            drawn=[list(drawn) for drawn in self._drawn.values()],
            report=report,
            classes=np.array([s.label for s in samples]) if self._settings.classes else None,
            teacher=None if self._settings.taught_passes is None else np.array([s.teacher for s in samples]),
        )

    def _judge_negatives(self) -> None:
        """Stops a run that declares hard negatives and has none: it would train another loss than it says."""
        enough = min(FEWEST_WITHOUT_NEGATIVES, self._total)
        if self._settings.hard_negatives and not self._negatives and self._read >= enough:
            raise UserError(
                f"rank {self._settings.rank}: loss.hard_negatives is set, but none of the first {self._read} samples read by a "
                "worker has a hard negative. Give samples a .neg.txt member or a list under "
                f"`{self._settings.data.negative_key}` (data.negative_key) in their .json, or set loss.hard_negatives=none."
            )

    def _judge(self, skipped: Counter[str]) -> None:
        total_bad = self._bad_by_shard.total()
        if self._bad_in_a_row > self._total:
            names = [name for reader in self._settings.sample_readers for name in reader.shards.locations]
            raise UserError(
                f"rank {self._settings.rank}: as many samples as {_few(names)} hold were drawn and none is usable ({_counts(skipped)}). "
                "Check the shards with tools/check_data.py; a sample needs an image and a .txt or .json caption."
            )
        if self._read >= FEWEST_TO_JUDGE and total_bad > self._settings.data.max_bad_fraction * self._read:
            worst = ", ".join(f"{name} ({n})" for name, n in self._bad_by_shard.most_common(3))
            raise UserError(
                f"{total_bad} of {self._read} samples read can't be used, more than data.max_bad_fraction "
                f"{self._settings.data.max_bad_fraction} ({_counts(self._reasons)}). Most are in {worst}. Repair these shards, correct the "
                "data setting that refuses them, or raise the limit."
            )


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())


def _few(names: list[str]) -> str:
    return redact(", ".join(names[:3])) + (" ..." if len(names) > 3 else "")
