"""What a supervisor keeps in a run's folder: every launch, and how much of the time was useful."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from dsclip.files import write_whole

JOURNAL, RECORD = "supervisor.jsonl", "supervisor.json"


class Record(TypedDict):
    """`supervisor.json`, over all of the run's supervised launches.

    useful_seconds: of the steps that the run now consists of, each counted once at the rate it was made at; ettr: their
    share of wall_seconds, the effective training time ratio.
    """

    launches: int
    restarts: int
    useful_seconds: float
    wall_seconds: float
    ettr: float


@dataclass(frozen=True)
class Launch:
    """One launch. started, ended: seconds since 1970; step: the last one that was logged when it ended."""

    started: float
    ended: float
    exit_code: int
    step: int
    decision: str


class Journal:
    """Of one run, over all its supervisors."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self.step = last_step(run_dir)
        self._earlier = _read(run_dir / JOURNAL)
        # Steps from before the first supervised launch are nothing that its time was spent on.
        self._first_step = min((int(entry["first_step"]) for entry in self._earlier), default=self.step)
        self._launches = len(self._earlier)
        self._wall_s = sum(entry["ended"] - entry["started"] + entry["delay_s"] for entry in self._earlier)

    def add(self, launch: Launch, delay_s: float) -> Record:
        """Notes a launch, and the time until the next one, and writes the record."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        entry = asdict(launch) | {"delay_s": delay_s, "first_step": self._first_step}
        with (self._run_dir / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.step = launch.step
        self._launches += 1
        self._wall_s += launch.ended - launch.started + delay_s
        useful = useful_seconds(self._run_dir, self._first_step)
        record: Record = {
            "launches": self._launches,
            "restarts": self._launches - 1,
            "useful_seconds": round(useful, 3),
            "wall_seconds": round(self._wall_s, 3),
            "ettr": round(useful / self._wall_s, 4) if self._wall_s else 0.0,
        }
        write_whole(self._run_dir / RECORD, json.dumps(record, indent=1) + "\n")
        return record


def last_step(run_dir: Path) -> int:
    """The last step that a run logged; 0 before the first."""
    return max((int(line["step"]) for line in _read(run_dir / "metrics.jsonl")), default=0)


def is_done(run_dir: Path, steps: int) -> bool:
    """Whether a run's summary says that it made all its steps."""
    try:
        return bool(json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["steps"] >= steps)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def useful_seconds(run_dir: Path, after_step: int) -> float:
    """Seconds of the steps after `after_step` in metrics.jsonl, where each stands once, however often it was made."""
    seconds, step = 0.0, after_step
    for line in _read(run_dir / "metrics.jsonl"):
        if line["step"] > step and line.get("samples_per_second"):
            batch = line["samples"] / line["step"]
            seconds += (line["step"] - step) * batch / line["samples_per_second"]
            step = line["step"]
    return seconds


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a kill may have cut the last one."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]
