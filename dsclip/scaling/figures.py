"""Figures of a study: error against compute with laws and bands, and what growing one thing alone does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dsclip.scaling.bottleneck import FACTORS, Series, short
from dsclip.scaling.drawing import XY, Drawing
from dsclip.scaling.study import FamilyFit

COLOURS = ("#d9730d", "#2463a8", "#2f855a", "#8d3fa8", "#b83250", "#55606e")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 470, 66, 52, 20, 52
PANEL_WIDTH, PANEL_HEIGHT = 330, 300
GRID, SOFT = "#e4e7eb", "#52606d"
AHEAD = 10.0  # times the largest compute: how far laws are drawn
TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8)  # of an axis of errors, in each power of ten


class Axes:
    """A frame with two logarithmic axes; `at` turns values into places."""

    def __init__(self, drawing: Drawing, corner: XY, size: XY, x: tuple[float, float], y: tuple[float, float]):
        self._drawing, self._corner, self._size = drawing, corner, size
        self._x = math.log10(x[0]), max(math.log10(x[1]), math.log10(x[0]) + 0.1)
        self._y = math.log10(y[0]), max(math.log10(y[1]), math.log10(y[0]) + 0.02)

    def at(self, x: float, y: float) -> XY:
        """The place of a pair of values; values beyond the axes go to the frame's edge in y."""
        share_x = (math.log10(x) - self._x[0]) / (self._x[1] - self._x[0])
        share_y = (math.log10(y) - self._y[0]) / (self._y[1] - self._y[0])
        left, top = self._corner
        return left + self._size[0] * share_x, top + self._size[1] * (1 - min(1.0, max(0.0, share_y)))

    def frame(self, x_name: str, y_name: str, *, percent: bool) -> None:
        """Lines of the grid with their values, and what the axes show."""
        d, (left, top), (wide, high) = self._drawing, self._corner, self._size
        for value in self._x_ticks():
            x, _ = self.at(value, 10 ** self._y[0])
            d.line([(x, top), (x, top + high)], GRID, 1)
            d.text((x, top + high + 17), _power(value), 11, "middle", SOFT)
        for value in self._y_ticks():
            _, y = self.at(10 ** self._x[0], value)
            d.line([(left, y), (left + wide, y)], GRID, 1)
            d.text((left - 6, y + 4), f"{100 * value:g}%" if percent else f"{value:g}", 11, "end", SOFT)
        d.line([(left, top), (left, top + high), (left + wide, top + high)], SOFT, 1)
        d.text((left + wide / 2, top + high + 38), x_name, 12, "middle")
        d.text((left - 40, top - 10), y_name, 12)

    def _x_ticks(self) -> list[float]:
        first, last = math.ceil(self._x[0] - 1e-9), math.floor(self._x[1] + 1e-9)
        step = max(1, (last - first) // 6)
        if last > first:
            return [10.0**k for k in range(first, last + 1, step)]
        return [float(f"{10**e:.2g}") for e in np.linspace(*self._x, 3)]

    def _y_ticks(self) -> list[float]:
        low, high = self._y
        found = [
            round(m * 10.0**k, 10) for k in range(math.floor(low), math.ceil(high) + 1) for m in TICKS
            if low <= math.log10(m * 10.0**k) <= high
        ]  # fmt: skip
        return found if len(found) > 1 else [float(f"{10**e:.3g}") for e in np.linspace(low, high, 4)]


def scaling_figure(fits: Sequence[FamilyFit]) -> Drawing:
    """Runs, laws (dashed where extrapolated) and 95% bands of all families on one task."""
    d = Drawing(WIDTH, HEIGHT)
    computes = [p.compute for f in fits for p in f.runs]
    errors = [p.error for f in fits for p in f.runs]
    ends = min(computes) / 1.6, max(computes) * AHEAD
    lowest = min([*errors, *(float(f.law.law.error(ends[1])) for f in fits)])
    axes = Axes(d, (LEFT, TOP), (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM), ends, (lowest / 1.1, max(errors) * 1.15))
    first = fits[0]
    axes.frame(
        "compute: GMACs of a sample's forward, times samples seen",
        f"error: {_error_name(first)}",
        percent=_shares(first),
    )
    d.text((WIDTH / 2, 16), f"{first.task}, {first.metric}", 14, "middle")
    legend = WIDTH - (350 if any(f.law.law.form != "power" for f in fits) else 262)
    for number, fit in enumerate(fits):
        colour = COLOURS[number % len(COLOURS)]
        _band(d, axes, fit, colour, ends[1])
        front = {(p.compute, p.error) for p in fit.front}
        for p in fit.runs:
            on = (p.compute, p.error) in front
            d.dot(axes.at(p.compute, p.error), colour, 4 if on else 3, 1.0 if on else 0.45)
        law = fit.law.law
        base = f"(C + {law.offset:.1e})" if law.offset else "C"
        irreducible = "" if law.form == "power" else f"{law.irreducible:.2f} + "
        words = f"{fit.family}: E = {irreducible}{law.beta:.2f} · {base}^{law.alpha:.2f}"
        d.line([(legend, TOP + 12 + 18 * number), (legend + 22, TOP + 12 + 18 * number)], colour, 2.5)
        d.text((legend + 28, TOP + 16 + 18 * number), words, 12)
    return d


def _band(d: Drawing, axes: Axes, fit: FamilyFit, colour: str, end: float) -> None:
    start, last = fit.range
    x = np.logspace(math.log10(start), math.log10(max(end, last)), 60)
    low, high = fit.band(x)
    upper = [axes.at(a, b) for a, b in zip(x, high, strict=True)]
    lower = [axes.at(a, b) for a, b in zip(x, low, strict=True)]
    d.area([*upper, *reversed(lower)], colour, 0.13)
    errors = fit.law.law.error(x)
    count = int((x <= last).sum())
    d.line([axes.at(a, b) for a, b in zip(x[:count], errors[:count], strict=True)], colour, 2)
    d.line([axes.at(a, b) for a, b in zip(x[count - 1 :], errors[count - 1 :], strict=True)], colour, 2, dashed=True)


def bottleneck_figure(title: str, series: Sequence[Series], *, percent: bool) -> Drawing:
    """A panel a factor: error as that factor grows and the two others are held, a line each."""
    kinds = [f for f in FACTORS if any(s.varied == f for s in series)]
    d = Drawing(LEFT + (PANEL_WIDTH + LEFT) * len(kinds), PANEL_HEIGHT + TOP + BOTTOM)
    d.text((d.width / 2, 16), title, 14, "middle")
    errors = [e for s in series for e in s.errors]
    names = {"model": "GMACs a sample", "data": "samples in the data set", "samples_seen": "samples seen"}
    for number, factor in enumerate(kinds):
        rows = [s for s in series if s.varied == factor]
        sizes = [x for s in rows for x in s.sizes]
        corner = LEFT + number * (PANEL_WIDTH + LEFT), TOP
        ends = min(sizes) / 1.3, max(sizes) * 1.3
        axes = Axes(d, corner, (PANEL_WIDTH, PANEL_HEIGHT), ends, (min(errors) / 1.05, max(errors) * 1.08))
        axes.frame(names[factor], "error", percent=percent)
        held = sorted({_held(s) for s in rows})
        for s in rows:
            colour = COLOURS[held.index(_held(s)) % len(COLOURS)]
            places = [axes.at(x, y) for x, y in zip(s.sizes, s.errors, strict=True)]
            d.line(places, colour, 1.5)
            for place in places:
                d.dot(place, colour, 3)
        for row, name in enumerate(held):
            d.text((corner[0] + PANEL_WIDTH - 4, TOP + 14 + 15 * row), name, 11, "end", COLOURS[row % len(COLOURS)])
    return d


def _held(s: Series) -> str:
    """What colours a line: the model, or the data where it is the model that grows."""
    return s.held.get("model") or s.held["data"]


def _power(value: float) -> str:
    exponent = round(math.log10(value))
    return f"1e{exponent}" if abs(value - 10.0**exponent) < 1e-6 * value else short(value)


def _shares(fit: FamilyFit) -> bool:
    """Whether the error is a share, which is shown in percent."""
    return "loss" not in fit.metric


def _error_name(fit: FamilyFit) -> str:
    return (
        fit.metric if fit.metric.endswith(("error", "loss")) else f"1 - {fit.metric}"
    )  # Pillow's font has no minus sign
