"""The HTML page of a run: self-contained, without scripts, made of nothing but what the run left."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fdu.config import EraseConfig
from fdu.evaluation import Figures, Probe
from fdu.pages import templates
from fdu.pictures import data_uri, strip
from fdu.report import charts
from fdu.report.run import SHOWN, SIDES, Run
from fdu.robustness.verdict import judge_robustness
from fdu.verdict import comparison, judge, percent

HEADINGS = {
    ("target", ""): "The target",
    ("unseen", ""): "The target in phrasings that the training never saw",
    ("retained", "near"): "Its neighbours, to be kept",
    ("retained", "generic"): "The anchor and everyday subjects, to be kept",
    ("retained", "unrelated"): "What has nothing to do with it, to be kept",
    ("cross_domain", ""): "Classes of another kind, to be kept",
}
"""Heading of each role and group, in the page's order."""
PARTS = {
    "target": "the target",
    "unseen": "the target, unseen phrasings",
    "retained": "retained",
    "near": "neighbours",
    "generic": "everyday",
    "unrelated": "unrelated",
    "cross_domain": "another kind",
}
"""Roles and groups, as the table of distances calls them."""
DISTANCES = {
    "change": "pixels",
    "distances.perceptual": "perceptual",
    "distances.kid": "KID",
    "distances.cmmd": "CMMD",
}
"""Columns of that table, by where the figures stand in an evaluation."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A share in [0, 1], with its interval where there is one."""

    value: float
    interval: Sequence[float] | None

    @classmethod
    def of(cls, figures: Figures, name: str, value: float) -> Figure:
        """The value of one side's figure, with the interval that stands under its name."""
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
class Row:
    """A class, before and after."""

    role: str
    name: str
    before: Figure
    after: Figure
    sides: list[Side]


def render(run: Run) -> str:
    """The page as HTML."""
    environment = templates()
    environment.filters["percent"] = lambda share: _unbroken(percent(share))
    environment.filters["range"] = lambda interval: f"{100 * interval[0]:.0f}\u2013{100 * interval[1]:.0f}\u00a0%"
    environment.filters["unbroken"] = _unbroken
    evaluation, record = run.evaluation, run.record
    groups = _groups(run)
    return environment.get_template("report/page.html.j2").render(
        target=run.target,
        anchor=record["anchor"]["name"] if record else None,
        record=record,
        evaluation=evaluation,
        verdict=judge(evaluation, run.probes),
        holds=judge_robustness(run.robustness, run.target) if run.robustness else None,
        comparison=comparison(evaluation, run.probes),
        groups=groups,
        classes=[row for _, rows in groups for row in rows if row.role != "unseen"],
        distances=_distances(run),
        robustness=_robustness(run.robustness) if run.robustness else None,
        charts=charts.training_charts(record["history"]) if record else [],
        settings=_settings(record["config"]) if record else [],
        chart=(charts.WIDTH, charts.HEIGHT, charts.LEFT, charts.BOTTOM, charts.MARGIN),
        shown=min(SHOWN, evaluation.images_per_class),
        commands=[line for line in ((record or {}).get("command", ""), run.command) if line],
        device=run.device,
        notes=run.notes,
    )


def _unbroken(text: str) -> str:
    """With percentages that no line break divides."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _groups(run: Run) -> list[tuple[str, list[Row]]]:
    """The rows of classes under their headings."""
    found: dict[tuple[str, str], list[Row]] = {key: [] for key in HEADINGS}
    for place, probe in enumerate(run.probes):
        sides = [_side(probe, run.images[side][place], run.seen[side][place], side) for side in SIDES]
        figures = [_figure(one, probe) for one in (run.evaluation.before, run.evaluation.after)]
        key = (probe.role, probe.group if probe.role == "retained" else "")
        found[key].append(Row(probe.role, probe.name, figures[0], figures[1], sides))
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


def _distances(run: Run) -> dict[str, Any] | None:
    """The table of how far the images moved: columns, and rows of (name, value and interval of each column)."""
    evaluation = run.evaluation
    tables: dict[str, Mapping[str, float]] = {"change": evaluation.change}
    tables |= {f"distances.{name}": values for name, values in evaluation.distances.items()}
    columns = {key: title for key, title in DISTANCES.items() if tables.get(key)}
    # A group is a row of its own where there are several.
    several = sum(group in evaluation.change for group in ("near", "generic", "unrelated")) > 1
    parts = {part: title for part, title in PARTS.items() if several or part != "near"}
    rows = [
        (title, [(tables[key].get(part), evaluation.intervals.get(f"{key}.{part}")) for key in columns])
        for part, title in parts.items()
        if any(part in tables[key] for key in columns)
    ]
    return {"columns": list(columns.values()), "rows": rows} if rows else None


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


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Name and value of every setting, and whether it differs from the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(EraseConfig)}

    def plain(value: Any) -> str:
        return ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)

    return [(name, plain(value), plain(value) != plain(defaults.get(name, value))) for name, value in config.items()]
