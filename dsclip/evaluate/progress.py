"""How far an evaluation is: one line that is written again on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from dsclip.command_line import format_seconds

LINE_EVERY_S = 5.0  # where there is no terminal
REDRAW_EVERY_S = 0.3


class EvaluationProgress:
    """work: {"images", "texts": how many are to be embedded in all}. Silent where it isn't enabled."""

    def __init__(
        self,
        work: Mapping[str, int],
        enabled: bool,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self._left, self._enabled, self._now = dict(work), enabled, now
        self._stream = stream or sys.stderr
        self._done = dict.fromkeys(work, 0)
        self._seconds = dict.fromkeys(work, 0.0)
        self._what, self._measuring_since = "", now()
        self._last = self._shown = now()

    def begin(self, what: str, *, show: bool = True) -> None:
        """The next entry, as `3/38 imagenet1k`. show: at once, and not only when something was embedded, which may be kept features."""
        self._what = what
        self._last = self._measuring_since = self._now()
        if show:
            self._show(force=True)

    def embedded(self, kind: str, count: int) -> None:
        """So many more have gone through the model."""
        now = self._now()
        self._seconds[kind] += now - self._last
        self._done[kind] += count
        self._left[kind] = max(0, self._left[kind] - count)
        self._last = self._measuring_since = now
        self._show(force=not any(self._left.values()))

    def fitted(self, done: int, of: int) -> None:
        """The task has fitted so many of at most so many classifiers to features."""
        left = (self._now() - self._measuring_since) / done * (of - done)
        self._draw(
            f"{self._what} · {done} of at most {of} classifiers fitted · ETA {format_seconds(left)}", force=False
        )

    def close(self) -> None:
        """Takes the line away from a terminal."""
        if self._enabled and self._stream.isatty():
            print("\r\033[K", end="", file=self._stream, flush=True)

    def message(self, text: str) -> None:
        """A line of its own."""
        if self._enabled:
            print(f"\r\033[K{text}" if self._stream.isatty() else text, file=self._stream, flush=True)

    def seconds_left(self) -> float | None:
        """From what an image and a text took so far; None before the first of what is left."""
        total = 0.0
        for kind, left in self._left.items():
            if left and not self._done[kind]:
                return None
            total += left * self._seconds[kind] / self._done[kind] if left else 0.0
        return total

    def _show(self, force: bool = False) -> None:
        left = self.seconds_left()
        left_text = "?" if left is None else format_seconds(left)
        counts = " · ".join(f"{n:,} {kind} left" for kind, n in self._left.items() if n)
        line = f"{self._what} · {counts} · ETA {left_text}" if counts else f"{self._what} · all embedded, measuring"
        self._draw(line, force)

    def _draw(self, line: str, force: bool) -> None:
        now, terminal = self._now(), self._stream.isatty()
        if not self._enabled or not (force or now - self._shown >= (REDRAW_EVERY_S if terminal else LINE_EVERY_S)):
            return
        self._shown = now
        print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", file=self._stream, flush=True)
