"""What a supervisor keeps in a run's folder: every launch, and how much of the time was useful."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

from dsclip.errors import UserError
from dsclip.files import write_whole

JOURNAL, RECORD = "supervisor.jsonl", "supervisor.json"


class Record(TypedDict):
    """`supervisor.json`, over all of the run's supervised launches.

    useful_seconds: of the steps since the first of them that the run now consists of, each counted once at the rate it was
    made at; wall_seconds: since that launch began, whatever happened in between; ettr: the share of the one in the other,
    the effective training time ratio.
    """

    launches: int
    restarts: int
    useful_seconds: float
    wall_seconds: float
    ettr: float


class Journal:
    """Of one run, over all its supervisors: a line when a launch begins, and another when it has ended."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        earlier = [entry for entry in _read(run_dir / JOURNAL) if "began" in entry and "first_step" in entry]
        self._launches = len(earlier)
        # Steps from before the first supervised launch are nothing that its time was spent on.
        self._began: float | None = earlier[0]["began"] if earlier else None
        self._first_step: int = earlier[0]["first_step"] if earlier else last_step(run_dir)

    def begin(self, now_s: float) -> None:
        """A launch begins; now_s: seconds since 1970. Raises UserError when the folder can't be written to."""
        self._began = now_s if self._began is None else self._began
        self._launches += 1
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._write({"launch": self._launches, "began": now_s, "first_step": self._first_step})
        except OSError as error:
            raise UserError(
                f"{self._run_dir} can't be written to ({error}); choose another place with train.output=DIR"
            ) from error

    def end(self, now_s: float, *, exit_code: int, step: int, decision: str) -> Record:
        """That launch has ended; step: the last one that it logged."""
        ended = {"launch": self._launches, "ended": now_s, "exit_code": exit_code, "step": step, "decision": decision}
        self._write(ended)
        useful = useful_seconds(self._run_dir, self._first_step)
        wall = now_s - (now_s if self._began is None else self._began)
        record: Record = {
            "launches": self._launches,
            "restarts": self._launches - 1,
            "useful_seconds": round(useful, 3),
            "wall_seconds": round(wall, 3),
            "ettr": round(useful / wall, 4) if wall else 0.0,
        }
        write_whole(self._run_dir / RECORD, json.dumps(record, indent=1) + "\n")
        return record

    def _write(self, entry: dict[str, Any]) -> None:
        with (self._run_dir / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def last_step(run_dir: Path) -> int:
    """The last step that a run logged; 0 before the first."""
    return max((line["step"] for line in _metrics(run_dir)), default=0)


def is_done(run_dir: Path, steps: int) -> bool:
    """Whether a run's summary says that it made all its steps."""
    try:
        return bool(json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["steps"] >= steps)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def useful_seconds(run_dir: Path, after_step: int) -> float:
    """Seconds of the steps after `after_step` in metrics.jsonl, where each stands once, however often it was made."""
    seconds, step = 0.0, after_step
    for line in _metrics(run_dir):
        if line["step"] > step and line.get("samples_per_second"):
            batch = line["samples"] / line["step"]
            seconds += (line["step"] - step) * batch / line["samples_per_second"]
            step = line["step"]
    return seconds


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in _read(run_dir / "metrics.jsonl") if isinstance(line.get("step"), int)]


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
