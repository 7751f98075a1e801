"""Charts as SVG, and the line charts of a report. Colours that are not given are currentColor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

SHADE = 'fill="currentColor" fill-opacity="0.65"'
CORNERS = {
    "square": ((-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)),
    "triangle": ((0, -5.4), (5.2, 4.2), (-5.2, 4.2)),
    "diamond": ((0, -6), (5.4, 0), (0, 6), (-5.4, 0)),
}
"""The shapes of marks besides "circle", around the origin."""
LEGEND_WIDTH, LEGEND_LINE = 230, 17
CELL = 18
"""Side of a cell of a heat map, in units of the view box."""
ITSELF, OTHERS = "itself", "others"
"""The first and the last column of a heat map."""
FILLS = {
    name: f'class="{name}" fill="{colour}"'
    for name, colour in {"fill-track": "#efede6", "fill-target": "#b4512b", "fill-after": "#1f6f78"}.items()
}
"""Cells of a heat map: the classes of the style sheet, and their colours where there is none."""
LOG_SPREAD = 1000
"""Ratio of a curve's largest value to its median above which the axis is logarithmic; pearson_chi2 can start at
1e17."""
CURVES = {
    "divergence": ("Divergence", "from the frozen model's output for the anchor; scaled so that h'(0) = 1"),
    "distance": ("Distance", "median squared distance from that output, in squared units of the denoiser's output"),
    "preservation": ("Preservation", "squared error on the preserved prompts, on the same scale as the divergence"),
    "critic": ("Critic", "its lower bound on the divergence"),
}
"""The training curves: title and explanation."""
Points = Iterable[tuple[float, float]]


class Scale(NamedTuple):
    """The ends of an axis and its ticks."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def share(self, value: float) -> float:
        """The position of a value, from 0 at the low end to 1 at the high end."""
        low, high, value = map(math.log10, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (value - low) / (high - low)

    @classmethod
    def around(cls, values: Sequence[float]) -> Scale:
        """An axis that extends slightly beyond all finite values."""
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
    """Sizes in units of the view box: the whole chart, and the margins around the plot."""

    width: int = 560
    height: int = 370
    left: int = 58
    top: int = 34
    right: int = 16
    bottom: int = 48


FRAME = Frame()
SMALL = Frame(width=360, height=204, left=46, top=10, right=10, bottom=44)


class Chart:
    """A chart; later parts cover earlier ones.

    Args:
        x, y: the axes.
        x_label, y_label: their labels.
        unit: the unit after the labels of y's ticks.
        frame: the sizes.

    Attributes:
        summary: the chart in words, for screen readers.
        legend: marks around the origin and their meanings.
    """

    def __init__(
        self, x: Scale, y: Scale, x_label: str, y_label: str = "", unit: str = "", frame: Frame = FRAME
    ) -> None:
        self.x, self.y, self.frame = x, y, frame
        self.parts: list[str] = []
        self.summary = ""
        self.legend: Sequence[tuple[str, str]] = ()
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
            # Above the axis, not along it: on a phone, the large letters would run into the ticks.
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

    def svg(self, whole: bool = False) -> str:
        """The chart as SVG; ``whole``, for a file of its own, has a legend and a background."""
        lines = [
            f'<g transform="translate({self.frame.width + 8} {self.frame.top + 10 + LEGEND_LINE * place})">{drawn}'
            f'<text x="12" y="4" {SHADE}>{escape(name)}</text></g>'
            for place, (drawn, name) in enumerate(self.legend if whole else ())
        ]
        width, height = self.frame.width + (LEGEND_WIDTH if lines else 0), self.frame.height
        ground = [f'<rect width="{width}" height="{height}" fill="#ffffff"/>'] if lines else []
        head = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        font = 'font-family="system-ui, sans-serif" font-size="12"'
        body = "\n".join([*ground, *self.parts, *lines])
        return f'<svg {head} {font} role="img" aria-label="{escape(self.summary)}">\n{body}\n</svg>\n'

    def _places(self, points: Points) -> str:
        return " ".join("{:.1f},{:.1f}".format(*self.place(x, y)) for x, y in points)


@dataclasses.dataclass(frozen=True)
class Captioned:
    """A chart of a page."""

    title: str
    explanation: str
    chart: Chart
    name: str = ""
    """Name of the file, if the chart is also a file."""


def mark(shape: str, x: float, y: float, colour: str, hollow: bool = False) -> str:
    """A mark: "circle", or one of ``CORNERS``."""
    fill = "none" if hollow else colour
    style = f'fill="{fill}" stroke="{colour}" stroke-width="1.6"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.6" {style}/>'
    points = " ".join(f"{x + right:.1f},{y + down:.1f}" for right, down in CORNERS[shape])
    return f'<polygon points="{points}" {style}/>'


def training_charts(history: Mapping[str, Sequence[float | None]]) -> list[Captioned]:
    """The training curves, one chart per column: each step faint, the running mean solid."""
    # None is NaN, which JSON lacks.
    courses = {name: np.array(history.get(name, ()), dtype=float) for name in CURVES}
    return [
        _training_chart(*CURVES[name], course)
        for name, course in courses.items()
        if (course[np.isfinite(course)] > 0).any()
    ]


def _training_chart(title: str, explanation: str, course: np.ndarray) -> Captioned:
    """The finite values of a curve over the steps, and their mean over a window of a twentieth of the curve."""
    finite, reach = np.isfinite(course), max(len(course) // 40, 1)
    sums, counts = (
        np.convolve(one, np.ones(2 * reach + 1))[reach:-reach] for one in (np.where(finite, course, 0), finite)
    )
    mean = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0.5)
    wide = course[finite].max() > LOG_SPREAD * np.median(course[finite])
    y = Scale.powers(course[finite & (course > 0)]) if wide else Scale.to(course[finite].max())
    chart = Chart(Scale.to(len(course)), y, "steps", frame=SMALL)
    for values, look in ((course, "raw"), (mean, "smooth")):
        points = [(step, max(value, y.low)) for step, value in enumerate(values, 1) if np.isfinite(value)]
        chart.line(points, f'class="{look}"')
    known = mean[np.isfinite(mean)]
    lost = "" if finite.all() else f"; {len(course) - finite.sum()} were not finite"
    told = f"smoothed: {known[0]:.3g} at the start, {known[-1]:.3g} at the end{lost}"
    chart.summary = f"{title} over {len(course)} steps, {told}"
    return Captioned(title, explanation, chart)


def share_chart(
    title: str, explanation: str, courses: Sequence[tuple[str, str, Sequence[tuple[int, Mapping[str, Any]]]]]
) -> Captioned:
    """Shares in [0, 1] against steps.

    Args:
        title, explanation: the caption.
        courses: for each line its name, its class in the style sheet, and (step, share) pairs, each share with the keys
            of a :class:`fdu.evaluation.intervals.Share`. Lines of the class "smooth" get a band for their
            intervals.
    """
    most = max((step for _, _, course in courses for step, _ in course), default=1) or 1
    percents = Scale(0, 100, range(0, 101, 25))
    chart = Chart(Scale.to(most, beyond=False), percents, "steps", unit=" %", frame=SMALL)
    for _, look, course in courses:
        if look == "smooth":
            chart.band([(step, *(100 * end for end in share["interval"])) for step, share in course], 'class="band"')
    for _, look, course in courses:
        chart.line([(step, 100 * share["value"]) for step, share in course], f'class="{look}"')
    told = [
        f"{name}: " + ", ".join(f"{100 * share['value']:.0f} % after {step}" for step, share in course)
        for name, _, course in courses
    ]
    chart.summary = f"{title}. {' steps; '.join(told)} steps"
    return Captioned(title, explanation, chart)


def became_chart(became: Mapping[str, Mapping[str, float]]) -> Captioned:
    """A heat map: what the images of each erased concept show. The first column is the concept itself, the last all
    classes that are the most frequent answer for none.

    Args:
        became: by concept, the judge's answers as shares in [0, 1], most frequent first.
    """
    names = list(became)
    first = [next((name for name in answers if name != concept), "") for concept, answers in became.items()]
    columns = [ITSELF, *dict.fromkeys(name for name in first if name), OTHERS]
    label = CELL * 0.55 * max(map(len, (*names, *columns)))
    frame = Frame(
        round(2 * label + CELL * len(columns)), round(label + CELL * len(names)), round(label), 0, round(label)
    )
    frame = frame._replace(bottom=frame.height - CELL * len(names))
    chart = Chart(Scale(0, len(columns), ()), Scale(0, len(names), ()), "", frame=frame)
    for row, (concept, answers) in enumerate(became.items()):
        known = {ITSELF: answers.get(concept, 0.0)}
        for name, share in answers.items():
            if name != concept:
                column = name if name in columns else OTHERS
                known[column] = known.get(column, 0.0) + share
        start, top = chart.place(0, len(names) - row)
        down = top + 0.75 * CELL
        chart.parts.append(
            f'<text x="{start - 6:.0f}" y="{down:.0f}" text-anchor="end" {SHADE}>{escape(concept)}</text>'
        )
        for place, column in enumerate(columns):
            share, look = known.get(column, 0.0), FILLS["fill-target" if column == ITSELF else "fill-after"]
            cell = f'x="{start + CELL * place:.0f}" y="{top:.0f}" width="{CELL - 1}" height="{CELL - 1}"'
            told = f"<title>{escape(f'{concept}, {column}: {100 * share:.0f} %')}</title>"
            chart.parts.append(f"<rect {cell} {FILLS['fill-track']}/>")
            if share:
                chart.parts.append(f'<g>{told}<rect {cell} {look} fill-opacity="{share:.2f}"/></g>')
    for place, column in enumerate(columns):
        across, down = chart.place(place + 0.75, 0)
        turned = f'transform="translate({across:.0f} {down + 8:.0f}) rotate(-60)"'
        chart.parts.append(f'<text {turned} text-anchor="end" {SHADE}>{escape(column)}</text>')
    left = [f"{name} {100 * answers[name]:.0f} %" for name, answers in became.items() if answers.get(name)]
    chart.summary = f"What {len(names)} concepts became; still drawn: {', '.join(left) or 'none'}"
    square = '<rect x="-5" y="-5" width="10" height="10" {}/>'
    named = {"fill-target": "still the concept", "fill-after": "another class"}
    chart.legend = [(square.format(FILLS[name]), words) for name, words in named.items()]
    return Captioned("What each concept became", "", chart)


def _step(span: float, most: int) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that fits into ``span`` at most ``most`` times."""
    unit = 10.0 ** math.floor(math.log10(span / most))
    return next(unit * factor for factor in (1, 2, 5, 10, 20) if span / (unit * factor) <= most)


def _multiples(step: float, first: int, last: int) -> list[float]:
    return [round(step * place, 12) for place in range(first, last + 1)]
