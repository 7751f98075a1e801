"""The charts of a comparison as SVG, inline in the page or as files of their own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from html import escape

import numpy as np

from fdu.comparison.front import Estimate, Standing, undominated
from fdu.report.svg import Chart, Scale, mark

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8860b", "#cc79a7", "#4aa3d9", "#7a5195", "#5f6b6d")
"""Colours of the divergences, in turn: Okabe and Ito's, distinct for colour-blind readers, a little darker."""
SHAPES = ("circle", "square", "triangle", "diamond")
"""Shapes of the marks, in turn, for s0 and other settings."""
AXES = {
    "erased": "target erased (%)",
    "retained": "other classes retained (%)",
    "change": "change of other classes (% of pixel range)",
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A figure along one number."""

    name: str
    points: Sequence[tuple[float, Estimate]]
    """Shares, in the order of the number."""
    colour: str
    dashed: bool = False


class Key:
    """The mark of each candidate: its colour tells the divergence, its shape everything else."""

    def __init__(self, standings: Sequence[Standing]) -> None:
        self.colours = dict(zip(dict.fromkeys(one.candidate.divergence for one in standings), itertools.cycle(COLOURS)))
        self.shapes = dict(zip(dict.fromkeys(map(_variant, standings)), itertools.cycle(SHAPES)))

    def mark(self, standing: Standing, x: float, y: float, hollow: bool) -> str:
        """A candidate's mark; hollow if it is dominated."""
        return mark(self.shapes[_variant(standing)], x, y, self.colours[standing.candidate.divergence], hollow)

    def entries(self) -> list[tuple[str, str]]:
        """Marks around the origin and their meanings."""
        colours = [(mark("circle", 0, 0, colour), name) for name, colour in self.colours.items()]
        shapes = [(mark(shape, 0, 0, "currentColor"), name) for name, shape in self.shapes.items()]
        return colours + (shapes if len(shapes) > 1 else [])


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
    better, digits = (1, 1) if figure == "retained" else (-1, 2)
    on_front = undominated(np.array([x.value for x in xs]), better * np.array([y.value for y in ys]))
    points = list(zip(standings, xs, ys, on_front, strict=True))
    chart = Chart(Scale.around(_ends(xs)), Scale.around(_ends(ys)), AXES["erased"], AXES[figure])
    dashes = 'fill="none" stroke="currentColor" stroke-opacity="0.55" stroke-dasharray="5 4"'
    chart.line(sorted((x.value, y.value) for _, x, y, on in points if on), dashes)
    for one, x, y, _ in points:
        style = f'fill="none" stroke="{key.colours[one.candidate.divergence]}" stroke-opacity="0.4" stroke-width="1.3"'
        chart.line(((x.low, y.value), (x.high, y.value)), style)
        chart.line(((x.value, y.low), (x.value, y.high)), style)
    for one, x, y, on in points:
        title = escape(f"{one.candidate.label}: erased {_words(x)}; {figure} {_words(y, digits)}")
        drawn = key.mark(one, *chart.place(x.value, y.value), hollow=not on)
        chart.parts.append(f"<g><title>{title}</title>{drawn}</g>")
    named = "; ".join(one.candidate.label for one, _, _, on in points if on)
    summary = f"{AXES[figure]} against {AXES['erased']}, {len(standings)} candidates. On the front: {named}"
    return chart.svg(summary, key.entries() if whole else ())


def curve_chart(curves: Sequence[Curve], x_label: str, y_label: str, whole: bool = False) -> str:
    """Figures with their intervals against a number, in percent.

    Args:
        curves: the curves.
        x_label, y_label: labels of the axes.
        whole: as in :func:`front_chart`.
    """
    scaled = [(curve, [(x, _percent(one)) for x, one in curve.points]) for curve in curves]
    xs = [x for curve in curves for x, _ in curve.points]
    ys = _ends([one for _, points in scaled for _, one in points])
    chart = Chart(Scale.around(xs), Scale.around(ys), x_label, y_label)
    for curve, points in scaled:
        chart.band([(x, one.low, one.high) for x, one in points], f'fill="{curve.colour}" fill-opacity="0.13"')
    for curve, points in scaled:
        dashes = ' stroke-dasharray="6 4"' if curve.dashed else ""
        style = f'fill="none" stroke="{curve.colour}" stroke-width="2"{dashes}'
        chart.line([(x, one.value) for x, one in points], style)
        for x, one in points:
            chart.parts.append(mark("circle", *chart.place(x, one.value), curve.colour, curve.dashed))
    summary = f"{y_label} against {x_label}. " + ". ".join(
        f"{curve.name}: " + ", ".join(f"{x:g}: {_words(one)}" for x, one in points) for curve, points in scaled
    )
    return chart.svg(summary, curve_entries(curves) if whole else ())


def curve_entries(curves: Sequence[Curve]) -> list[tuple[str, str]]:
    """The legend of :func:`curve_chart`."""
    return [(mark("circle", 0, 0, curve.colour, curve.dashed), curve.name) for curve in curves]


def _variant(standing: Standing) -> str:
    """A candidate's label without its divergence."""
    return standing.candidate.label.removeprefix(f"{standing.candidate.divergence} (").removesuffix(")")


def _percent(share: Estimate) -> Estimate:
    return Estimate(100 * share.value, 100 * share.low, 100 * share.high)


def _words(percent: Estimate, digits: int = 1) -> str:
    return f"{percent.value:.{digits}f} % ({percent.low:.{digits}f} to {percent.high:.{digits}f})"


def _ends(estimates: Sequence[Estimate]) -> list[float]:
    return [end for one in estimates for end in (one.low, one.high)]
