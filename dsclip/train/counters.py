"""What a run counts over all its launches and ranks; it travels with the checkpoints."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dsclip.data.batch import LoadReport
from dsclip.distributed import Collectives
from dsclip.train.records import Counts, Resume

T = TypeVar("T")


class Counters:
    """The counts of a run, summed over ranks at every `gather`, to which `total` belongs.

    saved: what a checkpoint holds of them. Rank 0 goes on from there, so that sums over ranks count it once.
    """

    def __init__(self, group: Collectives, saved: Mapping[str, Any] | None, resumed: Resume | None):
        self._group = group
        saved = saved if saved and group.rank == 0 else {}
        self._read: int = saved.get("samples_read", 0)
        self._slow: int = saved.get("slow_decoded", 0)
        self._bad: Counter[str] = Counter(saved.get("bad_samples", {}))
        self.skipped_steps: int = saved.get("skipped_steps", 0)
        self._earlier_s, self._started = saved.get("seconds", 0.0), time.monotonic()
        self._resumes: list[Resume] = [*saved.get("resumes", []), *([resumed] if resumed else [])]
        self.total = self._of_this_rank()

    def add(self, report: LoadReport, skipped: bool) -> None:
        """One step's batch of this rank."""
        self._read += report.read
        self._slow += report.slow_decoded
        self._bad.update(report.bad)
        self.skipped_steps += skipped

    def launch_seconds(self) -> float:
        """Since this launch began to train."""
        return time.monotonic() - self._started

    def gather(self, more: T) -> list[T]:
        """Collective. Puts the totals of all ranks, JSON-ready, into `total`; returns each rank's `more`."""
        gathered = self._group.all_gather_object((self._of_this_rank(), more))
        bad: Counter[str] = Counter()
        for counts, _ in gathered:
            bad.update(counts["bad_samples"])
        self.total = {
            **gathered[0][0],
            "samples_read": sum(counts["samples_read"] for counts, _ in gathered),
            "slow_decoded": sum(counts["slow_decoded"] for counts, _ in gathered),
            "bad_samples": dict(bad),
        }
        return [more for _, more in gathered]

    def _of_this_rank(self) -> Counts:
        return {
            "samples_read": self._read,
            "bad_samples": dict(self._bad),
            "slow_decoded": self._slow,
            "skipped_steps": self.skipped_steps,  # the same on all ranks; rank 0's holds those of earlier launches
            "seconds": round(self._earlier_s + self.launch_seconds(), 1),
            "resumes": self._resumes,
        }


@dataclass
class Tally:
    """What a launch has done since it began, at from_step: also the steps that it went back over. seconds: of its steps."""

    counters: Counters
    from_step: int
    steps: int = 0
    seconds: float = 0.0
