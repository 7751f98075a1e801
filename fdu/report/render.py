"""The HTML page of a run: self-contained, without scripts, made from the run's files alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fdu.config import EraseConfig
from fdu.evaluation import Evaluation, Figures, Probe
from fdu.evaluation.metrics.catalogue import metrics_of
from fdu.evaluation.metrics.clip_score import CLIP_SCORE
from fdu.evaluation.metrics.metric import Metric, PairMetric, SetMetric, ShareMetric
from fdu.evaluation.robustness.holding import judge_robustness
from fdu.evaluation.verdict import GROUPS, PARTS, comparison, joined, judge, percent
from fdu.evaluation.verdict import Row as Compared
from fdu.report import charts
from fdu.report.content import EvaluatedRun
from fdu.report.pictures import data_uri, strip
from fdu.report.stored import SHOWN, SIDES
from fdu.report.templating import templates

HEADINGS = {
    ("target", ""): "The target",
    ("unseen", ""): "The target in phrasings that the training never used",
    ("retained", "near"): "Its neighbours (to retain)",
    ("retained", "generic"): "The anchor and everyday subjects (to retain)",
    ("retained", "unrelated"): "Unrelated subjects (to retain)",
    ("cross_domain", ""): "Classes of another kind (to retain)",
}
"""Heading of each role and group, in the order of the page."""
WORDS = {"target": "the target", "unseen": "the target, unseen phrasings", **GROUPS, "cross_domain": "another kind"}
"""Roles and groups in the table of distances."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure with its interval, if any."""

    value: float
    interval: Sequence[float] | None

    @classmethod
    def of(cls, figures: Figures | Evaluation, name: str, value: float) -> Figure:
        """A figure by name, with its interval."""
        return cls(value, figures.intervals.get(name))


@dataclasses.dataclass(frozen=True)
class Side:
    """The images of one probe on one side of the erasure."""

    source: str
    """The images as a PNG data URI."""
    alt: str
    right: list[bool]
    """Per image: whether the judge saw the requested class."""


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """A class, before and after."""

    role: str
    name: str
    before: Figure
    after: Figure
    sides: list[Side]


def render(run: EvaluatedRun) -> str:
    """The page as HTML."""
    environment = templates()
    environment.filters["percent"] = lambda share: _unbroken(percent(share))
    environment.filters["range"] = lambda interval: f"{100 * interval[0]:.0f}\u2013{100 * interval[1]:.0f}\u00a0%"
    environment.filters["points"] = _points
    environment.filters["number"] = lambda value, digits=3: f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")
    environment.filters["unbroken"] = _unbroken
    evaluation, record = run.evaluation, run.record
    groups = _groups(run)
    return environment.get_template("report/page.html.j2").render(
        target=run.target,
        anchor=run.anchor,
        others=joined([name for name, _ in run.erased]) if run.anchor is None else "",
        evaluation=evaluation,
        verdict=judge(evaluation, run.probes),
        holds=judge_robustness(run.robustness, run.target) if run.robustness else None,
        summary=_summary(run),
        groups=groups,
        classes=[row for _, rows in groups for row in rows if row.role != "unseen"],
        canvas=[
            (one.title, one.meaning, Figure.of(evaluation, one.name, evaluation.unlearn_canvas[one.title]))
            for one in metrics_of(ShareMetric)
            if one.title in evaluation.unlearn_canvas
        ],
        distances=_distances(evaluation),
        robustness=_robustness(run.robustness) if run.robustness else None,
        charts=charts.training_charts(record["history"]) if record else [],
        settings=setting_rows(record["config"]) if record else [],
        chart=(charts.WIDTH, charts.HEIGHT, charts.LEFT, charts.BOTTOM, charts.MARGIN),
        shown=min(SHOWN, evaluation.images_per_class),
        commands=[("The erasure:", (record or {}).get("command", "")), ("This report:", run.command)],
        facts=[("The erasure", _erasure_facts(record) if record else []), ("The evaluation", _evaluation_facts(run))],
        notes=run.notes,
    )


def setting_rows(config: Mapping[str, Any], without: Collection[str] = ()) -> list[tuple[str, str, bool]]:
    """Name and value of each setting of an erasure, and whether it differs from the default.

    Args:
        config: :meth:`fdu.EraseConfig.as_dict`, or the one in a record.
        without: settings to leave out.
    """
    defaults = EraseConfig().as_dict()

    def plain(value: Any) -> str:
        return ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)

    return [
        (name, plain(value), plain(value) != plain(defaults.get(name, value)))
        for name, value in config.items()
        if name not in without
    ]


def _unbroken(text: str) -> str:
    """With no-break spaces in percentages."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _points(difference: float) -> str:
    """A difference of shares as whole percentage points, with its sign."""
    points = f"{100 * difference:+.0f}"
    return "0" if float(points) == 0 else points.replace("-", "\N{MINUS SIGN}")


def _erasure_facts(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Facts of an erasure's record beside its settings."""
    return [
        ("duration of the erasure", f"{record['seconds']:.1f} s"),
        ("sigma", f"{record['sigma']:.4g}"),
        ("fingerprint of the base weights", (record.get("fingerprint") or "unknown")[:16]),
        *record["versions"].items(),
    ]


def _evaluation_facts(run: EvaluatedRun) -> list[tuple[str, Any]]:
    """How the images were drawn and judged, as far as known."""
    conditions = run.conditions
    sampling = conditions.sampling.settings() if conditions.sampling else {}
    facts = [
        ("judge", conditions.judge or None),
        *((name, "the pipeline's own" if value is None else value) for name, value in sampling.items()),
        ("seed of the first image", conditions.seed),
        ("dtype", conditions.dtype or None),
        ("device", run.device or None),
        *conditions.versions.items(),
    ]
    return [(name, value) for name, value in facts if value is not None]


def _summary(run: EvaluatedRun) -> list[tuple[Compared, Figure | None]]:
    """The rows of the comparison, each with its difference if known."""
    evaluation = run.evaluation
    apart = {name: Figure.of(evaluation, f"difference.{name}", value) for name, value in evaluation.difference.items()}
    return [(row, apart.get(row.figure)) for row in comparison(evaluation, run.probes)]


def _groups(run: EvaluatedRun) -> list[tuple[str, list[ClassRow]]]:
    """The rows of classes under their headings."""
    found: dict[tuple[str, str], list[ClassRow]] = {key: [] for key in HEADINGS}
    for place, probe in enumerate(run.probes):
        sides = [_side(probe, run.images[side][place], run.seen[side][place], side) for side in SIDES]
        figures = [_figure(one, probe) for one in (run.evaluation.before, run.evaluation.after)]
        key = (probe.role, probe.group if probe.role == "retained" else "")
        found[key].append(ClassRow(probe.role, probe.name, figures[0], figures[1], sides))
    return [(HEADINGS[key], rows) for key, rows in found.items() if rows]


def _figure(figures: Figures, probe: Probe) -> Figure:
    if probe.role == "unseen":
        return Figure.of(figures, "unseen_accuracy", figures.unseen_accuracy or 0.0)
    return Figure.of(figures, f"per_class.{probe.name}", figures.per_class[probe.name])


def _side(probe: Probe, images: Any, seen: Sequence[str], when: str) -> Side:
    counted = ", ".join(
        f"{name} {count} times" if count > 1 else f"{name} once" for name, count in Counter(seen).most_common()
    )
    alt = f"{len(seen)} images for {probe.name} {when} the erasure; the judge saw {counted}"
    return Side(data_uri(strip(images)), alt, [name == probe.name for name in seen])


def _distances(evaluation: Evaluation) -> dict[str, Any] | None:
    """The table of distances and CLIP scores: columns, and rows of (name, figures)."""

    before, after = evaluation.before, evaluation.after
    score, title = f"{CLIP_SCORE.name}.", CLIP_SCORE.title
    apart = {key.removeprefix(score): one for key, one in evaluation.difference.items() if key.startswith(score)}
    given: list[tuple[str, Metric, Figures | Evaluation, str, Mapping[str, float]]] = [
        (f"{title} before", CLIP_SCORE, before, score, before.clip_score),
        (f"{title} after", CLIP_SCORE, after, score, after.clip_score),
        (f"{title}, difference", CLIP_SCORE, evaluation, f"difference.{score}", apart),
    ]
    for one in metrics_of(PairMetric, SetMetric):
        given.append((one.title, one, evaluation, f"{one.name}.", evaluation.measured(one.name) or {}))
    columns = [
        (title, metric.meaning, {part: Figure.of(figures, f"{name}{part}", value) for part, value in values.items()})
        for title, metric, figures, name, values in given
        if values
    ]
    rows = [
        (WORDS[part], [figures.get(part) for _, _, figures in columns])
        for part in PARTS
        if any(part in figures for _, _, figures in columns)
    ]
    heads = [(title, meaning) for title, meaning, _ in columns]
    return {"columns": heads, "rows": rows, "scored": bool(after.clip_score)} if rows else None


def _robustness(found: Mapping[str, Any]) -> dict[str, Any]:
    """The robustness tests for the page."""
    drawn: list[charts.Chart] = []
    if found.get("attack"):
        attacked, before = found["attack"], found.get("attack_before")
        courses = []
        if before:
            courses.append(("before the erasure", "reference", _course(before)))
        others = [number for number in range(len(attacked["attempts"])) if number != attacked["chosen"]]
        courses += [(f"erased, attempt {number + 1}", "raw", _course(attacked, number)) for number in others]
        courses.append(("erased", "smooth", _course(attacked)))
        explanation = "share of images that show the target, by steps of the attack; dashed: before the erasure"
        drawn.append(charts.share_chart("Attack on the embeddings", explanation, courses))
    if found.get("relearning"):
        course = found["relearning"]["course"]
        explanation = "share of images that show the target, by steps of fine-tuning on its images"
        drawn.append(charts.share_chart("Relearning", explanation, [("erased", "smooth", course)]))
    phrasings = [
        {"name": name, **figures, "worst": next(iter(figures["by_prompt"].items()))}
        for name, figures in (found.get("phrasings") or {}).items()
    ]
    return {
        "phrasings": phrasings,
        "charts": drawn,
        "attack": found.get("attack"),
        "attack_before": found.get("attack_before"),
        "relearning": found.get("relearning"),
    }


def _course(attacked: Mapping[str, Any], number: int | None = None) -> list[tuple[int, Mapping[str, Any]]]:
    """The shares by step of one attempt, by default the chosen one, starting before the attack."""
    attempt = attacked["attempts"][attacked["chosen"] if number is None else number]
    return [(0, attacked["before"]), *attempt["course"]]
