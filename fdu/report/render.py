"""The HTML page of a run: self-contained, without scripts, made of nothing but what the run left."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fdu.config import EraseConfig
from fdu.evaluation import Evaluation, Figures, Probe
from fdu.evaluation.robustness.holding import judge_robustness
from fdu.evaluation.verdict import GROUPS, MEASURES, PARTS, comparison, joined, judge, percent
from fdu.evaluation.verdict import Row as Compared
from fdu.report import charts
from fdu.report.content import EvaluatedRun
from fdu.report.pictures import data_uri, strip
from fdu.report.stored import SHOWN, SIDES
from fdu.report.templating import templates

HEADINGS = {
    ("target", ""): "The target",
    ("unseen", ""): "The target in phrasings that the training never saw",
    ("retained", "near"): "Its neighbours, to be kept",
    ("retained", "generic"): "The anchor and everyday subjects, to be kept",
    ("retained", "unrelated"): "What has nothing to do with it, to be kept",
    ("cross_domain", ""): "Classes of another kind, to be kept",
}
"""Heading of each role and group, in the page's order."""
WORDS = {"target": "the target", "unseen": "the target, unseen phrasings", **GROUPS, "cross_domain": "another kind"}
"""Roles and groups, as the table of distances calls them."""
CANVAS = {
    "UA": "unlearning accuracy: images of the target in which the judge sees something else",
    "IRA": "in-domain retain accuracy: images of its neighbours that show what was asked for",
    "CRA": "cross-domain retain accuracy: the same of classes of another kind",
}
"""The accuracies of UnlearnCanvas in words."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure, with its interval where there is one."""

    value: float
    interval: Sequence[float] | None

    @classmethod
    def of(cls, figures: Figures | Evaluation, name: str, value: float) -> Figure:
        """The value of a figure, with the interval that stands under its name."""
        return cls(value, figures.intervals.get(name))


@dataclasses.dataclass(frozen=True)
class Side:
    """What one probe drew on one side of the erasure."""

    source: str
    """The images as a PNG data URI."""
    alt: str
    right: list[bool]
    """A flag an image: whether the judge saw what was asked for."""


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
            (name, words, Figure.of(evaluation, f"unlearn_canvas.{name}", evaluation.unlearn_canvas[name]))
            for name, words in CANVAS.items()
            if name in evaluation.unlearn_canvas
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
    """Name and value of every setting of an erasure, and whether it differs from the default.

    Args:
        config: :meth:`fdu.EraseConfig.as_dict`, or what was read of a record.
        without: names of settings to leave out.
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
    """With percentages that no line break divides."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _points(difference: float) -> str:
    """A difference of shares as whole percentage points, with its sign."""
    points = f"{100 * difference:+.0f}"
    return "0" if float(points) == 0 else points.replace("-", "\N{MINUS SIGN}")


def _erasure_facts(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a record tells of an erasure beside its settings."""
    return [
        ("duration of the erasure", f"{record['seconds']:.1f} s"),
        ("sigma", f"{record['sigma']:.4g}"),
        ("fingerprint of the base weights", (record.get("fingerprint") or "not known")[:16]),
        *record["versions"].items(),
    ]


def _evaluation_facts(run: EvaluatedRun) -> list[tuple[str, Any]]:
    """How the images were drawn and judged, as far as it is known."""
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
    """The rows of the comparison, each with the difference of its figure where that is known."""
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
    alt = f"{len(seen)} images drawn for {probe.name} {when} the erasure; the judge saw {counted}"
    return Side(data_uri(strip(images)), alt, [name == probe.name for name in seen])


def _distances(evaluation: Evaluation) -> dict[str, Any] | None:
    """The table of how far the images moved, and of what CLIP says of them: columns, and rows of (name, figures)."""

    def column(
        title: str, figures: Figures | Evaluation, name: str, values: Mapping[str, float]
    ) -> tuple[str, dict[str, Figure]]:
        return title, {part: Figure.of(figures, f"{name}.{part}", values[part]) for part in PARTS if part in values}

    before, after = evaluation.before, evaluation.after
    score = "clip_score"
    apart = {
        key.removeprefix(f"{score}."): value for key, value in evaluation.difference.items() if key.startswith(score)
    }
    tables = {"change": evaluation.change}
    tables |= {f"distances.{name}": values for name, values in evaluation.distances.items()}
    given = [
        column("CLIP score before", before, score, before.clip_score),
        column("CLIP score after", after, score, after.clip_score),
        column("CLIP score, difference", evaluation, f"difference.{score}", apart),
        *(column(title, evaluation, name, tables.get(name, {})) for name, title in MEASURES.items()),
    ]
    columns = {title: figures for title, figures in given if figures}
    rows = [
        (WORDS[part], [figures.get(part) for figures in columns.values()])
        for part in PARTS
        if any(part in figures for figures in columns.values())
    ]
    return {"columns": list(columns), "rows": rows, "scored": bool(after.clip_score)} if rows else None


def _robustness(found: Mapping[str, Any]) -> dict[str, Any]:
    """The tests of robustness, as the page shows them."""
    drawn: list[charts.Chart] = []
    if found.get("attack"):
        attacked, before = found["attack"], found.get("attack_before")
        courses = []
        if before:
            courses.append(("before the erasure", "reference", _course(before)))
        others = [number for number in range(len(attacked["attempts"])) if number != attacked["chosen"]]
        courses += [(f"erased, attempt {number + 1}", "raw", _course(attacked, number)) for number in others]
        courses.append(("erased", "smooth", _course(attacked)))
        explanation = "images that show the target, by steps of the attack; dashed: the pipeline before the erasure"
        drawn.append(charts.share_chart("Attack on the conditioning", explanation, courses))
    if found.get("relearning"):
        course = found["relearning"]["course"]
        explanation = "images that show the target, by steps of fine-tuning on images of it"
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
    """The shares by steps of one attempt, the chosen one by default, from before the attack on."""
    attempt = attacked["attempts"][attacked["chosen"] if number is None else number]
    return [(0, attacked["before"]), *attempt["course"]]
