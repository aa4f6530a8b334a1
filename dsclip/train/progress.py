"""The progress line: a bar on a terminal, a plain line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from dsclip.command_line import format_seconds

LINE_EVERY_S = 5.0  # seconds between lines where there is no terminal
RATE_WINDOW = 50  # steps the estimate of the remaining time looks back


class Progress:
    """Shows steps done, time left and the current metrics; silent on every rank but the first."""

    def __init__(self, total_steps: int, start_step: int, enabled: bool, stream: TextIO | None = None):
        self._total, self._enabled = total_steps, enabled
        self._stream = stream or sys.stderr
        self._times: deque[tuple[int, float]] = deque([(start_step, time.monotonic())], maxlen=RATE_WINDOW)
        self._last_line = 0.0
        self._bar = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, file=self._stream, unit="step", dynamic_ncols=True,
                             bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{remaining} left] {desc}")  # fmt: skip

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """After each step. metrics: loss, accuracy, logit_scale, lr, grad_norm, samples_per_second, data_wait, ..."""
        if not self._enabled:
            return
        now = time.monotonic()
        self._times.append((step, now))
        if self._bar is not None:
            self._bar.set_description_str(describe(metrics), refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._last_line >= LINE_EVERY_S or step == self._total:
            self._last_line = now
            share = step / self._total
            print(
                f"step {step}/{self._total} · {share:.0%} · ETA {self._eta(step)} · {describe(metrics)}",
                file=self._stream,
                flush=True,
            )

    def _eta(self, step: int) -> str:
        (first_step, first), (_, now) = self._times[0], self._times[-1]
        if step == first_step:
            return "?"
        return format_seconds((self._total - step) * (now - first) / (step - first_step))

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def describe(metrics: Mapping[str, Any]) -> str:
    """`loss 2.31 · acc 41% · scale 14.9 · lr 5.0e-04 · grad 0.80 · 310 samples/s · wait 2%`, problems last."""
    text = (
        f"loss {metrics['loss']:.3f} · acc {metrics['accuracy']:.0%} · scale {metrics['logit_scale']:.1f} · "
        f"lr {metrics['lr']:.1e} · grad {metrics['grad_norm']:.2f} · {metrics['samples_per_second']:.0f} samples/s · "
        f"wait {metrics['data_wait']:.0%}"
    )
    if metrics.get("skipped_steps"):
        text += f" · {metrics['skipped_steps']} steps skipped"
    if metrics.get("bad_samples"):
        text += f" · {metrics['bad_samples']} bad samples"
    return text
