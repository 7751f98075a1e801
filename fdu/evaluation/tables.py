"""The figures of an evaluation as tables: rows and columns for report and card, and aligned text to print."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fdu.evaluation.metrics.catalogue import metrics_of
from fdu.evaluation.metrics.clip_score import CLIP_SCORE
from fdu.evaluation.metrics.metric import Metric, PairMetric, SetMetric
from fdu.evaluation.verdict import counted_names, judge, names_of, percent

if TYPE_CHECKING:
    from fdu.evaluation import Evaluation, Probe
    from fdu.evaluation.intervals import Interval

PARTS = ("target", "unseen", "near", "generic", "unrelated", "cross_domain")
"""The parts of an evaluation with distances, in the order of the table."""
Measured = tuple[float, "Interval | None"]
"""A figure and its interval."""


def summary(evaluation: Evaluation, probes: Sequence[Probe]) -> str:
    """The tables of an evaluation and the headline of its verdict."""
    parts = [table(evaluation, probes)]
    if evaluation.features:
        name = evaluation.features
        parts.append(f"Images before and after, in the features of {name}:\n{distance_table(evaluation)}")
    return "\n\n".join([*parts, f"{judge(evaluation, probes).headline}."])


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the comparison: shares in [0, 1] before and after."""

    label: str
    before: float
    after: float
    detail: bool
    """Whether it details the row above it."""
    intervals: tuple[Interval, Interval] | None
    """95 % intervals of both shares; None if none were computed."""
    figure: str
    """The name of the shares in :class:`fdu.Figures`: "per_class.three"."""


def comparison(evaluation: Evaluation, probes: Sequence[Probe]) -> list[Row]:
    """The rows of the table: the targets and the least erased of several, unseen phrasings, what else the targets'
    prompts ask for, retained classes and the worst of them, classes of another kind.

    Several groups of retained classes, or several attributes of the prompts, have a row each.
    """
    before, after = evaluation.before, evaluation.after

    def row(label: str, figure: str, detail: bool = False) -> Row:
        known = figure in before.intervals and figure in after.intervals
        intervals = (before.intervals[figure], after.intervals[figure]) if known else None
        return Row(label, before.value(figure), after.value(figure), detail, intervals, figure)

    targets = names_of(probes, "target")
    rows = [row(counted_names(targets, "concepts"), "target_accuracy")]
    if len(targets) > 1:
        most = max(targets, key=after.per_class.__getitem__)
        rows.append(row(f"least erased: {most}", f"per_class.{most}", detail=True))
    if after.unseen_accuracy is not None:
        rows.append(row("in unseen phrasings", "unseen_accuracy", detail=True))
    if after.attribute_accuracy is not None:
        names = list(after.attributes)
        only = f" ({names[0]})" if len(names) == 1 else ""
        whose = "its" if len(targets) == 1 else "their"
        rows.append(row(f"what else {whose} prompts ask for{only}", "attribute_accuracy"))
        rows += [row(name, f"attributes.{name}", detail=True) for name in names if not only]
    rows.append(row(_counted("retained", names_of(probes, "retained")), "retained_accuracy"))
    for group in after.retained_by_group if len(after.retained_by_group) > 1 else ():
        names = [probe.name for probe in probes if probe.role == "retained" and probe.group == group]
        rows.append(row(_counted(group, names), f"retained_by_group.{group}", detail=True))
    worst = row(f"worst: {after.worst_retained_class}", f"per_class.{after.worst_retained_class}", detail=True)
    lowest = after.intervals.get("worst_retained_accuracy")
    if worst.intervals and lowest:  # this class was chosen for its share after
        worst = dataclasses.replace(worst, intervals=(worst.intervals[0], lowest))
    rows.append(worst)
    if after.cross_domain_accuracy is not None:
        rows.append(row(_counted("another kind", names_of(probes, "cross_domain")), "cross_domain_accuracy"))
    return rows


def _counted(label: str, names: Sequence[str]) -> str:
    return f"{label} ({len(names)} class{'es' if len(names) != 1 else ''})"


def table(evaluation: Evaluation, probes: Sequence[Probe]) -> str:
    """The comparison as aligned text, each share with its 95 % interval."""
    lines = [["", "before", "after"]]
    for row in comparison(evaluation, probes):
        cells = [percent(row.before), percent(row.after)]
        for place, (low, high) in enumerate(row.intervals or ()):
            cells[place] += f" {f'[{100 * low:.0f}, {100 * high:.0f}]':>9}"
        lines.append([("  " if row.detail else "") + row.label, *cells])
    return _aligned(lines)


def distance_columns(evaluation: Evaluation) -> list[tuple[str, Metric, dict[str, Measured]]]:
    """Title, metric and figures by part of each column in the table of distances and CLIP scores."""
    before, after, score = evaluation.before, evaluation.after, f"{CLIP_SCORE.name}."
    apart = {key.removeprefix(score): one for key, one in evaluation.difference.items() if key.startswith(score)}
    columns: list[tuple[str, Metric, dict[str, float], dict[str, Interval], str]] = [
        (f"{CLIP_SCORE.title} before", CLIP_SCORE, before.clip_score, before.intervals, score),
        (f"{CLIP_SCORE.title} after", CLIP_SCORE, after.clip_score, after.intervals, score),
        (f"{CLIP_SCORE.title}, difference", CLIP_SCORE, apart, evaluation.intervals, f"difference.{score}"),
    ]
    for one in metrics_of(PairMetric, SetMetric):
        columns.append((one.title, one, evaluation.measured(one.name), evaluation.intervals, f"{one.name}."))
    return [
        (title, metric, {part: (value, intervals.get(f"{prefix}{part}")) for part, value in values.items()})
        for title, metric, values, intervals, prefix in columns
        if values
    ]


def distance_table(evaluation: Evaluation) -> str:
    """Distances between the images before and after, and their CLIP scores, as aligned text with 95 % intervals."""
    columns = [column for column in distance_columns(evaluation) if not column[0].endswith("difference")]
    lines = [["", *(title for title, _, _ in columns)]]
    for part in PARTS:
        if part in evaluation.change:
            cells = [_measured(*values[part]) if part in values else "" for _, _, values in columns]
            lines.append([part.replace("_", " "), *cells])
    return _aligned(lines)


def _measured(value: float, interval: Interval | None) -> str:
    return f"{value:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else f"{value:.3g}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first aligned left, the others right."""
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(cell.rjust(max(width, 7)) for cell, width in zip(cells, others, strict=True))])
        for name, *cells in lines
    )
