"""Whether to start a run again, and when."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from dsclip.errors import RunDiverged, RunStopped, UserError

DAY_S = 24 * 3600.0
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 300.0


@dataclass(frozen=True)
class Decision:
    """delay_s: until the next launch; None: there is none. why: in words."""

    delay_s: float | None
    why: str


class Policy:
    """Crashes are counted by the day and by the step at which they happen."""

    def __init__(self, crashes_a_day: int, crashes_a_step: int):
        """crashes_a_day: more of them within 24 hours end it; crashes_a_step: so many in a row at one step do."""
        self._crashes_a_day, self._crashes_a_step = crashes_a_day, crashes_a_step
        self._crashes: deque[float] = deque()  # their times
        self._step: int | None = None  # of the last crash
        self._in_a_row = 0

    def after(self, code: int, step: int, now_s: float, *, done: bool = False) -> Decision:
        """What follows a launch that ended with this exit code.

        step: the last one it logged; now_s: on any clock; done: whether the run's summary is there. DeepSpeed 0.19.8's runner
        ends with 0 when its `launch` was killed.
        """
        if code == 0 and done:
            return Decision(None, "the run is done")
        if code == UserError.exit_code:
            return Decision(
                None, "the input is wrong, and starting again would not mend it: its lines above say what to change"
            )
        if code == RunDiverged.exit_code:
            return Decision(
                None,
                "it diverged, by numbers that are no longer finite or a loss that keeps jumping, and starting again would not mend it",
            )
        if code == RunStopped.exit_code:
            return Decision(FIRST_DELAY_S, "it was stopped by a signal, and saved")
        self._in_a_row = self._in_a_row + 1 if step == self._step else 1
        self._step = step
        self._crashes.append(now_s)
        while now_s - self._crashes[0] > DAY_S:
            self._crashes.popleft()
        what = f"it ended with {describe(code)} after step {step}" + (", before its last step" if code == 0 else "")
        if self._in_a_row >= self._crashes_a_step:
            return Decision(None, f"{what}, {self._in_a_row} times in a row without a step logged in between")
        if len(self._crashes) > self._crashes_a_day:
            return Decision(None, f"{what}, and crashed {len(self._crashes)} times within a day")
        return Decision(min(LONGEST_DELAY_S, FIRST_DELAY_S * 4 ** (self._in_a_row - 1)), what)


def describe(code: int) -> str:
    """An exit code in words, as subprocess gives it: negative is a signal."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
