"""What a run counts over all its launches and ranks; it travels with the checkpoints."""

from __future__ import annotations

import time
from collections import Counter

from dsclip.data.batch import LoadReport


class Counters:
    """Samples read, bad samples by reason, JPEGs that only Pillow read, skipped steps, seconds, and where the run was resumed with which changes.

    total is as old as the last `gather`. saved: what a checkpoint holds of it. Rank 0 goes on from there, so that sums over ranks count it once.
    """

    def __init__(self, group, saved: dict | None, resumed: dict | None):
        self._group = group
        saved = saved if saved and group.rank == 0 else {}
        self._read = saved.get("samples_read", 0)
        self._slow = saved.get("slow_decoded", 0)
        self._bad = Counter(saved.get("bad_samples", {}))
        self.skipped_steps = saved.get("skipped_steps", 0)
        self._earlier_s, self._started = saved.get("seconds", 0.0), time.monotonic()
        self._resumes = [*saved.get("resumes", []), *([resumed] if resumed else [])]
        self.total = self._own()

    def add(self, report: LoadReport, skipped: bool) -> None:
        """One step's batch of this rank."""
        self._read += report.read
        self._slow += report.slow_decoded
        self._bad.update(report.bad)
        self.skipped_steps += skipped

    def launch_seconds(self) -> float:
        """Since this launch began to train."""
        return time.monotonic() - self._started

    def gather(self, more=None) -> list:
        """Collective. Puts the totals of all ranks, JSON-ready, into `total`; returns each rank's `more`."""
        parts, others = zip(*self._group.all_gather_object((self._own(), more)), strict=True)
        bad: Counter = Counter()
        for part in parts:
            bad.update(part["bad_samples"])
        sums = {name: sum(part[name] for part in parts) for name in ("samples_read", "slow_decoded")}
        self.total = parts[0] | sums | {"bad_samples": dict(bad)}
        return list(others)

    def _own(self) -> dict:
        return {
            "samples_read": self._read,
            "bad_samples": dict(self._bad),
            "slow_decoded": self._slow,
            "skipped_steps": self.skipped_steps,  # the same on all ranks; rank 0's holds those of earlier launches
            "seconds": round(self._earlier_s + self.launch_seconds(), 1),
            "resumes": self._resumes,
        }
