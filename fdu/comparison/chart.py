"""The charts of a comparison as SVG, inline in the page or as files of their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from fdu.comparison.front import Estimate, Standing, undominated

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 370, 58, 48, 34, 16
LEGEND_WIDTH, LEGEND_LINE = 230, 17
"""Sizes in the units of the view box."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8860b", "#cc79a7", "#4aa3d9", "#7a5195", "#5f6b6d")
"""Colours of the divergences, in turn: Okabe and Ito's, distinct for colour-blind readers, a little darker."""
SHAPES = ("circle", "square", "triangle", "diamond")
"""Shapes of the marks, in turn, for s0 and other settings."""
AXES = {
    "erased": "target erased (%)",
    "retained": "other classes retained (%)",
    "change": "change of other classes (% of pixel range)",
}
SHADE = 'fill="currentColor" fill-opacity="0.65"'


@dataclasses.dataclass(frozen=True)
class Curve:
    """A figure along one number."""

    name: str
    points: Sequence[tuple[float, Estimate]]
    """Shares, in the order of the number."""
    colour: str
    dashed: bool = False


class Key:
    """The colour and shape of each candidate."""

    def __init__(self, standings: Sequence[Standing]) -> None:
        self.divergences = list(dict.fromkeys(one.candidate.divergence for one in standings))
        self.variants = list(dict.fromkeys(_variant(one) for one in standings))

    def colour(self, standing: Standing) -> str:
        """By divergence."""
        return COLOURS[self.divergences.index(standing.candidate.divergence) % len(COLOURS)]

    def shape(self, standing: Standing) -> str:
        """By everything else."""
        return SHAPES[self.variants.index(_variant(standing)) % len(SHAPES)]

    def entries(self) -> list[tuple[str, str]]:
        """Marks (SVG around the origin) and their meanings."""
        colours = [(mark("circle", 0, 0, COLOURS[i % len(COLOURS)]), name) for i, name in enumerate(self.divergences)]
        shapes = [(mark(SHAPES[i % len(SHAPES)], 0, 0, "currentColor"), name) for i, name in enumerate(self.variants)]
        return colours + (shapes if len(shapes) > 1 else [])


class Axes:
    """Two linear axes that hold all values given, and their places in the view box."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str) -> None:
        self.x_low, self.x_high, self.x_ticks = _scale(xs)
        self.y_low, self.y_high, self.y_ticks = _scale(ys)
        self.labels = x_label, y_label

    def x(self, value: float) -> float:
        """Where a value lies, from the left."""
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        """Where a value lies, from the top."""
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - self.y_low) / (self.y_high - self.y_low)

    def line(self, points: Iterable[tuple[float, float]]) -> str:
        """Points for a polyline."""
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def frame(self) -> list[str]:
        """Grid, ticks and labels."""
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
                f'stroke-opacity="0.14"/><text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" {SHADE}>{tick:g}</text>'
            )
        for tick in self.x_ticks:
            place = f'x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}"'
            parts.append(f'<text {place} text-anchor="middle" {SHADE}>{tick:g}</text>')
        across, (x_label, y_label) = LEFT + (WIDTH - LEFT - RIGHT) / 2, map(escape, self.labels)
        parts.append(f'<text x="{across}" y="{HEIGHT - 8}" text-anchor="middle" {SHADE}>{x_label}</text>')
        # Above the axis, not along it: on a phone the letters are large, and it would meet the ticks.
        parts.append(f'<text x="4" y="18" {SHADE}>{y_label}</text>')
        return parts


def front_chart(standings: Sequence[Standing], figure: str = "retained", whole: bool = False) -> str:
    """Erased against retained, or against the change of images, with intervals and the Pareto front.

    Args:
        standings: the candidates.
        figure: "retained" (more is better) or "change" (less is better).
        whole: add a legend and a background, for a file of its own.
    """
    key = Key(standings)
    xs = [_percent(one.erased) for one in standings]
    ys = [_percent(getattr(one, figure)) for one in standings]
    axes = Axes(_ends(xs), _ends(ys), AXES["erased"], AXES[figure])
    better = 1 if figure == "retained" else -1
    front = undominated(np.array([x.value for x in xs]), better * np.array([y.value for y in ys]))
    points = [(x.value, y.value) for x, y in zip(xs, ys, strict=True)]
    dashed = 'fill="none" stroke="currentColor" stroke-opacity="0.55" stroke-dasharray="5 4"'
    ends = axes.line(sorted(point for point, on in zip(points, front, strict=True) if on))
    parts = [*axes.frame(), f'<polyline points="{ends}" {dashed}/>']
    for one, x, y in zip(standings, xs, ys, strict=True):
        style = f'fill="none" stroke="{key.colour(one)}" stroke-opacity="0.4" stroke-width="1.3"'
        for course in (((x.low, y.value), (x.high, y.value)), ((x.value, y.low), (x.value, y.high))):
            parts.append(f'<polyline points="{axes.line(course)}" {style}/>')
    for one, x, y, on in zip(standings, xs, ys, front, strict=True):
        title = f"{one.candidate.label}: erased {_words(x)}; {figure} {_words(y, 1 if better > 0 else 2)}"
        drawn = mark(key.shape(one), axes.x(x.value), axes.y(y.value), key.colour(one), hollow=not on)
        parts.append(f"<g><title>{escape(title)}</title>{drawn}</g>")
    named = "; ".join(one.candidate.label for one, on in zip(standings, front, strict=True) if on)
    summary = f"{AXES[figure]} against {AXES['erased']}, {len(standings)} candidates. On the front: {named}"
    return _svg(parts, summary, key.entries() if whole else None)


def curve_chart(curves: Sequence[Curve], x_label: str, y_label: str, whole: bool = False) -> str:
    """Figures with their intervals against a number, in percent.

    Args:
        curves: the curves.
        x_label, y_label: labels of the axes.
        whole: as in :func:`front_chart`.
    """
    scaled = [(curve, [(x, _percent(one)) for x, one in curve.points]) for curve in curves]
    xs = [x for curve in curves for x, _ in curve.points]
    axes = Axes(xs, _ends([one for _, points in scaled for _, one in points]), x_label, y_label)
    parts = axes.frame()
    for curve, points in scaled:
        band = axes.line([(x, one.low) for x, one in points] + [(x, one.high) for x, one in points[::-1]])
        parts.append(f'<polygon points="{band}" fill="{curve.colour}" fill-opacity="0.13"/>')
    for curve, points in scaled:
        dashes = ' stroke-dasharray="6 4"' if curve.dashed else ""
        line = axes.line([(x, one.value) for x, one in points])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{curve.colour}" stroke-width="2"{dashes}/>')
        parts += [mark("circle", axes.x(x), axes.y(one.value), curve.colour, curve.dashed) for x, one in points]
    summary = f"{y_label} against {x_label}. " + ". ".join(
        f"{curve.name}: " + ", ".join(f"{x:g}: {_words(one)}" for x, one in points) for curve, points in scaled
    )
    return _svg(parts, summary, curve_entries(curves) if whole else None)


def curve_entries(curves: Sequence[Curve]) -> list[tuple[str, str]]:
    """The legend of :func:`curve_chart`."""
    return [(mark("circle", 0, 0, curve.colour, curve.dashed), curve.name) for curve in curves]


def mark(shape: str, x: float, y: float, colour: str, hollow: bool = False) -> str:
    """A mark; hollow if the candidate is dominated."""
    fill = "none" if hollow else colour
    style = f'fill="{fill}" stroke="{colour}" stroke-width="1.6"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.6" {style}/>'
    corners = {
        "square": ((-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)),
        "triangle": ((0, -5.4), (5.2, 4.2), (-5.2, 4.2)),
        "diamond": ((0, -6), (5.4, 0), (0, 6), (-5.4, 0)),
    }[shape]
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
    return f'<polygon points="{points}" {style}/>'


def _variant(standing: Standing) -> str:
    """A candidate's label without its divergence."""
    return standing.candidate.label.removeprefix(f"{standing.candidate.divergence}, ")


def _percent(share: Estimate) -> Estimate:
    return Estimate(100 * share.value, 100 * share.low, 100 * share.high)


def _words(percent: Estimate, digits: int = 1) -> str:
    return f"{percent.value:.{digits}f} % ({percent.low:.{digits}f} to {percent.high:.{digits}f})"


def _ends(estimates: Sequence[Estimate]) -> list[float]:
    return [end for one in estimates for end in (one.low, one.high)]


def _scale(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Ends of an axis, a little beyond all finite values, and round ticks between them."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    reach = max(0.06 * (high - low), 1e-3 * abs(high), 1e-6)
    low, high = low - reach, high + reach
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(unit * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (unit * factor) <= 7)
    ticks = range(math.ceil(low / step), math.floor(high / step) + 1)
    return low, high, [round(step * place, 10) for place in ticks]


def _svg(parts: list[str], summary: str, legend: list[tuple[str, str]] | None) -> str:
    width = WIDTH + (LEGEND_WIDTH if legend else 0)
    ground = f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>' if legend else ""
    lines = [
        f'<g transform="translate({WIDTH + 8} {TOP + 10 + LEGEND_LINE * place})">{drawn}'
        f'<text x="12" y="4" {SHADE}>{escape(name)}</text></g>'
        for place, (drawn, name) in enumerate(legend or [])
    ]
    head = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}"'
    font = 'font-family="system-ui, sans-serif" font-size="12"'
    body = "\n".join([ground, *parts, *lines])
    return f'<svg {head} {font} role="img" aria-label="{escape(summary, quote=True)}">\n{body}\n</svg>\n'
