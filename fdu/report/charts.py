"""The line charts of a report, as points in the units of an SVG view box."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 360, 190, 46, 30, 10
"""Sizes of a chart in its own units."""
LOG_SPREAD = 1000
"""A curve whose largest value exceeds its median this many times has a logarithmic axis: pearson_chi2 can start at
1e17."""
CURVES = {
    "divergence": ("Divergence", "from the frozen model's output for the anchor; scaled so that h'(0) = 1"),
    "distance": ("Distance", "median squared distance from that output, in squared units of the denoiser's output"),
    "preservation": ("Preservation", "squared error on the preserved prompts, on the same scale as the divergence"),
    "critic": ("Critic", "its lower bound on the divergence"),
}
"""The training curves: title and explanation."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One polyline."""

    points: str
    look: str
    """Its class in the style sheet."""


@dataclasses.dataclass(frozen=True)
class Chart:
    """A line chart."""

    title: str
    explanation: str
    summary: str
    """The curve in words, for screen readers."""
    lines: list[Line]
    y_ticks: list[tuple[float, str]]
    x_ticks: list[tuple[float, str]]
    bands: list[str] = dataclasses.field(default_factory=list)
    """Polygons behind the lines: intervals."""


def training_charts(history: Mapping[str, Sequence[float | None]]) -> list[Chart]:
    """The training curves, one chart per column: each step faint, the running mean solid."""
    return [
        _training_chart(title, explanation, history[name])
        for name, (title, explanation) in CURVES.items()
        if any(_drawable(value) and value > 0 for value in history.get(name, ()))
    ]


def share_chart(
    title: str, explanation: str, courses: Sequence[tuple[str, str, Sequence[tuple[int, Mapping[str, Any]]]]]
) -> Chart:
    """Shares in [0, 1] against steps.

    Args:
        title, explanation: the caption.
        courses: for each line its name, its class in the style sheet, and (step, share) pairs, each share with the keys
            of a :class:`fdu.evaluation.robustness.shares.Share`. Lines of the class "smooth" get a band for their
            intervals.
    """
    most = max((step for _, _, course in courses for step, _ in course), default=1) or 1
    width, height = WIDTH - LEFT - MARGIN, HEIGHT - BOTTOM - MARGIN

    def place(step: float, share: float) -> str:
        return f"{LEFT + width * step / most:.1f},{MARGIN + height * (1 - share):.1f}"

    lines, bands, words = [], [], []
    for name, look, course in courses:
        lines.append(Line(" ".join(place(step, share["value"]) for step, share in course), look))
        if look == "smooth":
            upper = [place(step, share["interval"][1]) for step, share in course]
            lower = [place(step, share["interval"][0]) for step, share in reversed(course)]
            bands.append(" ".join(upper + lower))
        if course:
            told = ", ".join(f"{100 * share['value']:.0f} % after {step}" for step, share in course)
            words.append(f"{name}: {told} steps")
    _, steps = _ticks(most)
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    return Chart(
        title,
        explanation,
        f"{title}. " + "; ".join(words),
        lines,
        [(MARGIN + height * (1 - tick), f"{100 * tick:.0f} %") for tick in ticks],
        [(LEFT + width * step / most, f"{step:g}") for step in steps if step <= most],
        bands,
    )


def _training_chart(title: str, explanation: str, values: Sequence[float | None]) -> Chart:
    smooth = _smoothed(values)
    drawn = [value for value in values if _drawable(value)]
    ends = [value for value in smooth if value is not None]
    lost = f"; {len(values) - len(drawn)} were not finite" if len(drawn) < len(values) else ""
    scale: Callable[[float], float] = float
    top, ticks = _ticks(max(drawn))
    if max(drawn) > LOG_SPREAD * statistics.median(drawn):
        scale, ticks = math.log10, _powers([value for value in drawn if value > 0])
        top = ticks[-1]
    bottom = scale(ticks[0])
    width, height = WIDTH - LEFT - MARGIN, HEIGHT - BOTTOM - MARGIN

    def x(step: float) -> float:
        return LEFT + width * step / max(len(values) - 1, 1)

    def y(value: float) -> float:
        return MARGIN + height * (1 - (scale(min(max(value, ticks[0]), top)) - bottom) / (scale(top) - bottom))

    def line(course: Sequence[float | None]) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in enumerate(course) if _drawable(value))

    _, steps = _ticks(len(values))
    return Chart(
        title,
        explanation,
        f"{title} over {len(values)} steps, smoothed: {ends[0]:.3g} at the start, {ends[-1]:.3g} at the end{lost}",
        [Line(line(values), "raw"), Line(line(smooth), "smooth")],
        [(y(value), f"{value:g}") for value in ticks],
        [(x(step - 1 if step else 0), f"{step:g}") for step in steps if step <= len(values)],
    )


def _powers(positive: Sequence[float]) -> list[float]:
    """Powers of ten around all values, at most six."""
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    step = max(math.ceil((high - low) / 5), 1)
    steps = max(math.ceil((high - low) / step), 1)
    return [10.0**exponent for exponent in range(high - step * steps, high + 1, step)]


def _drawable(value: float | None) -> TypeGuard[float]:
    """Whether a value is finite; records hold NaN and infinities, or null instead."""
    return value is not None and math.isfinite(value)


def _smoothed(values: Sequence[float | None]) -> list[float | None]:
    """The mean of the finite values in a window of a twentieth of the curve; None where there are none."""
    reach = max(len(values) // 40, 1)
    smooth: list[float | None] = []
    for step in range(len(values)):
        window = [value for value in values[max(step - reach, 0) : step + reach + 1] if _drawable(value)]
        smooth.append(sum(value / len(window) for value in window) if window else None)
    return smooth


def _ticks(largest: float) -> tuple[float, list[float]]:
    """A round number >= ``largest``, and ticks from 0 to it in three to five round steps."""
    unit = 10.0 ** math.floor(math.log10(largest))
    step = next(unit * factor for factor in (0.2, 0.25, 0.5, 1.0, 2.0, 2.5) if unit * factor * 5 >= largest)
    count = math.ceil(largest / step - 1e-9)
    return count * step, [round(index * step, 12) for index in range(count + 1)]
