"""The HTML report of an erasure: one self-contained page of verdict, pictures, figures, course and settings."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, PackageLoader, StrictUndefined

from fdu.config import EraseConfig
from fdu.evaluation import Draws, Evaluation, Probe
from fdu.pictures import data_uri, strip
from fdu.verdict import comparison, judge, percent, uncertainty

SHOWN = 8
"""Images a class that the page shows on either side."""
ROLES = {
    "target": "The target",
    "unseen": "The target in phrasings that the training never saw",
    "retained": "Its neighbours, to be kept",
    "cross_domain": "Classes of another kind, to be kept",
}
"""Heading of each role, in the page's order."""
CHART_WIDTH, CHART_HEIGHT, CHART_LEFT, CHART_BOTTOM, CHART_MARGIN = 360, 190, 46, 30, 10
"""Sizes of a line chart in its own units."""
CURVES = {
    "divergence": ("Divergence", "from the frozen model's answer to the anchor; scaled so that h'(0) = 1"),
    "preservation": ("Preservation", "squared error on the prompts to keep, in the same scale"),
}
"""The curves of the training's course: title and explanation."""


@dataclasses.dataclass(frozen=True)
class Side:
    """What one probe drew on one side of the erasure."""

    source: str
    """The images as a PNG data URI."""
    alt: str
    right: list[bool]
    """A flag an image: whether the judge saw what was asked for."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The rows of pictures of one role: name, shares before and after, and both sides."""

    title: str
    rows: list[tuple[str, float, float, Side, Side]]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A line chart, its points in the units of its view box."""

    title: str
    explanation: str
    raw: str
    smooth: str
    y_ticks: list[tuple[float, str]]
    x_ticks: list[tuple[float, str]]
    summary: str
    """The course in words, for those who cannot see it."""


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    probes: Sequence[Probe],
    before: Draws,
    after: Draws,
    record: Mapping[str, Any] | None = None,
    command: str = "",
    device: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Write the page.

    Args:
        path: the file to write.
        evaluation: the figures of ``before`` and ``after``.
        probes: what was drawn, in the order of the draws.
        before, after: the images of every probe, [N, 3, H, W] in [0, 1].
        record: :meth:`fdu.ErasureResult.record`, or the ``fdu.json`` beside saved weights. Without it the page has no
            course of the training and no settings.
        command: the command line that makes this page again.
        device: what it ran on, in words.
        notes: paragraphs to end with, such as the source of the data.

    Raises:
        ValueError: the draws do not belong to the probes.
        OSError: the file cannot be written.
    """
    if not len(probes) == len(before.images) == len(after.images):
        counts = f"{len(before.images)} and {len(after.images)}"
        raise ValueError(f"before and after must hold the images of {len(probes)} probes, got {counts}")
    environment = Environment(
        loader=PackageLoader("fdu"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: _unbroken(percent(share))
    environment.filters["unbroken"] = _unbroken
    target = next(probe.name for probe in probes if probe.role == "target")
    page = environment.get_template("report.html.j2").render(
        target=target,
        anchor=record["anchor"]["name"] if record else None,
        record=record,
        evaluation=evaluation,
        verdict=judge(evaluation, probes),
        comparison=comparison(evaluation, probes),
        uncertainty=uncertainty(evaluation.images_per_class),
        groups=_groups(evaluation, probes, before, after),
        classes=_classes(evaluation, probes),
        charts=_charts(record["history"]) if record else [],
        settings=_settings(record["config"]) if record else [],
        chart=(CHART_WIDTH, CHART_HEIGHT, CHART_LEFT, CHART_BOTTOM, CHART_MARGIN),
        shown=min(SHOWN, evaluation.images_per_class),
        command=command,
        device=device,
        notes=notes,
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _unbroken(text: str) -> str:
    """With percentages that no line break divides."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _groups(evaluation: Evaluation, probes: Sequence[Probe], before: Draws, after: Draws) -> list[Group]:
    groups = []
    for role, title in ROLES.items():
        rows = []
        for probe, one, other in zip(probes, before.images, after.images, strict=True):
            if probe.role == role:
                shares = [_share(figures, probe) for figures in (evaluation.before, evaluation.after)]
                sides = [_side(probe, images[:SHOWN], when) for images, when in ((one, "before"), (other, "after"))]
                rows.append((probe.name, shares[0], shares[1], sides[0], sides[1]))
        if rows:
            groups.append(Group(title, rows))
    return groups


def _share(figures: Any, probe: Probe) -> float:
    return figures.unseen_accuracy if probe.role == "unseen" else figures.per_class[probe.name]


def _side(probe: Probe, images: Any, when: str) -> Side:
    seen = probe.judge(images)
    counted = ", ".join(
        f"{name} {count} times" if count > 1 else f"{name} once" for name, count in Counter(seen).most_common()
    )
    alt = f"{len(seen)} images drawn for {probe.name} {when} the erasure; the judge saw {counted}"
    return Side(data_uri(strip(images)), alt, [name == probe.name for name in seen])


def _classes(evaluation: Evaluation, probes: Sequence[Probe]) -> list[tuple[str, str, float, float]]:
    """Role, name and shares of every class, for the bars."""
    before, after = evaluation.before.per_class, evaluation.after.per_class
    return [
        (role, probe.name, before[probe.name], after[probe.name])
        for role in ("target", "retained", "cross_domain")
        for probe in probes
        if probe.role == role
    ]


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Name and value of every setting, and whether it differs from the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(EraseConfig)}

    def plain(value: Any) -> str:
        return ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)

    return [(name, plain(value), plain(value) != plain(defaults.get(name, value))) for name, value in config.items()]


def _charts(history: Mapping[str, Sequence[float | None]]) -> list[Chart]:
    return [
        _chart(title, explanation, history[name])
        for name, (title, explanation) in CURVES.items()
        if any(_drawable(value) and value > 0 for value in history.get(name, ()))
    ]


def _drawable(value: float | None) -> TypeGuard[float]:
    """Whether a value has a place on a chart: records hold NaN and infinities, or null in their stead."""
    return value is not None and math.isfinite(value)


def _chart(title: str, explanation: str, values: Sequence[float | None]) -> Chart:
    smooth = _smoothed(values)
    drawn = [value for value in values if _drawable(value)]
    ends = [value for value in smooth if value is not None]
    lost = f"; {len(values) - len(drawn)} were not finite" if len(drawn) < len(values) else ""
    top, ticks = _ticks(max(drawn))
    width, height = CHART_WIDTH - CHART_LEFT - CHART_MARGIN, CHART_HEIGHT - CHART_BOTTOM - CHART_MARGIN

    def x(step: float) -> float:
        return CHART_LEFT + width * step / max(len(values) - 1, 1)

    def y(value: float) -> float:
        return CHART_MARGIN + height * (1 - value / top)

    def line(course: Sequence[float | None]) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in enumerate(course) if _drawable(value))

    _, steps = _ticks(len(values))
    return Chart(
        title,
        explanation,
        line(values),
        line(smooth),
        [(y(value), f"{value:g}") for value in ticks],
        [(x(step - 1 if step else 0), f"{step:g}") for step in steps if step <= len(values)],
        f"{title} over {len(values)} steps, smoothed: {ends[0]:.3g} at first, {ends[-1]:.3g} at the end{lost}",
    )


def _smoothed(values: Sequence[float | None]) -> list[float | None]:
    """The mean of what is finite in a twentieth of the course around each step; None where nothing is."""
    reach = max(len(values) // 40, 1)
    smooth: list[float | None] = []
    for step in range(len(values)):
        window = [value for value in values[max(step - reach, 0) : step + reach + 1] if _drawable(value)]
        smooth.append(sum(value / len(window) for value in window) if window else None)
    return smooth


def _ticks(largest: float) -> tuple[float, list[float]]:
    """A round number not below ``largest``, and 0 and three to five round steps up to it."""
    unit = 10.0 ** math.floor(math.log10(largest))
    step = next(unit * factor for factor in (0.2, 0.25, 0.5, 1.0, 2.0, 2.5) if unit * factor * 5 >= largest)
    count = math.ceil(largest / step - 1e-9)
    return count * step, [round(index * step, 12) for index in range(count + 1)]
