"""Charts as SVG, for a page or as files: axes with round ticks, lines, bands and marks. All else takes currentColor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

SHADE = 'fill="currentColor" fill-opacity="0.65"'
CORNERS = {
    "square": ((-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)),
    "triangle": ((0, -5.4), (5.2, 4.2), (-5.2, 4.2)),
    "diamond": ((0, -6), (5.4, 0), (0, 6), (-5.4, 0)),
}
"""The marks beside "circle", around the origin."""
LEGEND_WIDTH, LEGEND_LINE = 230, 17
Points = Iterable[tuple[float, float]]


class Scale(NamedTuple):
    """The ends of an axis and its ticks."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high one."""
        low, high, value = map(math.log10, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (value - low) / (high - low)

    @classmethod
    def around(cls, values: Sequence[float]) -> Scale:
        """An axis that reaches a little beyond all finite values."""
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        reach = max(0.06 * (high - low), 1e-3 * abs(high), 1e-6)
        low, high = low - reach, high + reach
        step = _step(high - low, 7)
        return cls(low, high, _multiples(step, math.ceil(low / step), math.floor(high / step)))

    @classmethod
    def to(cls, largest: float, beyond: bool = True) -> Scale:
        """An axis from 0 to ``largest`` > 0, or, with ``beyond``, to the next tick."""
        step = _step(largest, 5)
        ticks = _multiples(step, 0, math.ceil(largest / step - 1e-9) if beyond else math.floor(largest / step + 1e-9))
        return cls(0.0, ticks[-1] if beyond else largest, ticks)

    @classmethod
    def powers(cls, positive: Sequence[float]) -> Scale:
        """A logarithmic axis between powers of ten around all values, with six ticks at most."""
        low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        step = max(math.ceil((high - low) / 5), 1)
        steps = max(math.ceil((high - low) / step), 1)
        ticks = [10.0**exponent for exponent in range(high - step * steps, high + 1, step)]
        return cls(ticks[0], ticks[-1], ticks, log=True)


class Frame(NamedTuple):
    """Sizes in the units of the view box: the whole, and the margins around the plot."""

    width: int = 560
    height: int = 370
    left: int = 58
    top: int = 34
    right: int = 16
    bottom: int = 48


FRAME = Frame()


@dataclasses.dataclass(frozen=True)
class Captioned:
    """A chart of a page."""

    title: str
    explanation: str
    svg: str
    legend: Sequence[tuple[str, str]] = ()
    """Marks around the origin, and their meanings."""


class Chart:
    """A chart; what is drawn last lies on top.

    Args:
        x, y: the axes.
        x_label, y_label: their labels.
        unit: of the labels of y's ticks.
        frame: the sizes.
    """

    def __init__(
        self, x: Scale, y: Scale, x_label: str, y_label: str = "", unit: str = "", frame: Frame = FRAME
    ) -> None:
        self.x, self.y, self.frame = x, y, frame
        self.parts: list[str] = []
        left, right = frame.left, frame.width - frame.right
        for tick in y.ticks:
            _, place = self.place(x.low, tick)
            self.parts.append(
                f'<line x1="{left}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}" stroke="currentColor" '
                f'stroke-opacity="0.14"/>'
                f'<text x="{left - 8}" y="{place + 4:.1f}" text-anchor="end" {SHADE}>{tick:g}{unit}</text>'
            )
        below = [(*self.place(tick, y.low), 18, f"{tick:g}") for tick in x.ticks]
        for across, down, by, words in [*below, (left + (right - left) / 2, frame.height, -8, escape(x_label))]:
            self.parts.append(f'<text x="{across:.1f}" y="{down + by:.0f}" text-anchor="middle" {SHADE}>{words}</text>')
        if y_label:
            # Above the axis, not along it: on a phone the letters are large, and it would meet the ticks.
            self.parts.append(f'<text x="4" y="18" {SHADE}>{escape(y_label)}</text>')

    def place(self, x: float, y: float) -> tuple[float, float]:
        """A point in the view box, from the left and from the top."""
        frame = self.frame
        across = (frame.width - frame.left - frame.right) * self.x.share(x)
        up = (frame.height - frame.bottom - frame.top) * self.y.share(y)
        return frame.left + across, frame.height - frame.bottom - up

    def line(self, points: Points, style: str) -> None:
        """A polyline with these attributes."""
        self.parts.append(f'<polyline points="{self._places(points)}" {style}/>')

    def band(self, intervals: Iterable[tuple[float, float, float]], style: str) -> None:
        """A polygon through x and both ends of an interval."""
        intervals = list(intervals)
        around = [(x, low) for x, low, _ in intervals] + [(x, high) for x, _, high in reversed(intervals)]
        self.parts.append(f'<polygon points="{self._places(around)}" {style}/>')

    def svg(self, summary: str, legend: Iterable[tuple[str, str]] = ()) -> str:
        """The chart, with a summary for screen readers; as a file of its own with a legend of marks and meanings."""
        lines = [
            f'<g transform="translate({self.frame.width + 8} {self.frame.top + 10 + LEGEND_LINE * place})">{drawn}'
            f'<text x="12" y="4" {SHADE}>{escape(name)}</text></g>'
            for place, (drawn, name) in enumerate(legend)
        ]
        width, height = self.frame.width + (LEGEND_WIDTH if lines else 0), self.frame.height
        ground = [f'<rect width="{width}" height="{height}" fill="#ffffff"/>'] if lines else []
        head = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        font = 'font-family="system-ui, sans-serif" font-size="12"'
        body = "\n".join([*ground, *self.parts, *lines])
        return f'<svg {head} {font} role="img" aria-label="{escape(summary)}">\n{body}\n</svg>\n'

    def _places(self, points: Points) -> str:
        return " ".join("{:.1f},{:.1f}".format(*self.place(x, y)) for x, y in points)


def mark(shape: str, x: float, y: float, colour: str, hollow: bool = False) -> str:
    """A mark: "circle", or one of ``CORNERS``."""
    fill = "none" if hollow else colour
    style = f'fill="{fill}" stroke="{colour}" stroke-width="1.6"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.6" {style}/>'
    points = " ".join(f"{x + right:.1f},{y + down:.1f}" for right, down in CORNERS[shape])
    return f'<polygon points="{points}" {style}/>'


def _step(span: float, most: int) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that fits into ``span`` at most ``most`` times."""
    unit = 10.0 ** math.floor(math.log10(span / most))
    return next(unit * factor for factor in (1, 2, 5, 10, 20) if span / (unit * factor) <= most)


def _multiples(step: float, first: int, last: int) -> list[float]:
    return [round(step * place, 12) for place in range(first, last + 1)]
