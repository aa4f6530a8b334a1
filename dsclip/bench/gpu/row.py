"""What a phase measures: rows of the table with their accept lines, and facts beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Facts = dict[str, Any]  # ready for JSON; those of all phases are put together


@dataclass(frozen=True)
class Row:
    """One number. value None: not measured, and `note` says why. accept, stretch: its lines, None where it only informs.

    at_most: smaller is better. exactness: judged on a CPU too, where times mean nothing.
    """

    name: str
    value: float | None
    unit: str = ""
    accept: float | None = None
    stretch: float | None = None
    at_most: bool = False
    exactness: bool = False
    note: str = ""

    def met(self, device: str) -> bool | None:
        """Whether the accept line is met; None where there is nothing to judge."""
        if self.accept is None or self.value is None or (device == "cpu" and not self.exactness):
            return None
        return self.value <= self.accept if self.at_most else self.value >= self.accept  # also false for NaN


@dataclass(frozen=True)
class Settings:
    """What a phase is told. device: cuda | cpu. tiny: shapes that a laptop runs in seconds.

    options: of this phase, such as its preset. facts: what the phases before it found.
    """

    device: str
    tiny: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def repeats(self) -> int:
        """How often a thing is timed; its median counts."""
        return 2 if self.tiny else 5
