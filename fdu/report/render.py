"""The report of a run: an HTML page, self-contained and without scripts, and a picture, from the run's files alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from fdu.config import EraseConfig, updated
from fdu.evaluation import Draws, Evaluation, Figures
from fdu.evaluation.metrics.catalogue import metrics_of
from fdu.evaluation.metrics.metric import ShareMetric
from fdu.evaluation.robustness import Robustness
from fdu.evaluation.robustness.holding import judge_robustness
from fdu.evaluation.tables import PARTS, comparison, distance_columns
from fdu.evaluation.verdict import GROUPS, joined, judge, percent
from fdu.report.advice import help_pages, next_steps
from fdu.report.charts import Captioned, became_chart, share_chart, training_charts
from fdu.report.pictures import before_after, data_uri, strip
from fdu.report.run import KEPT_HEIGHT, SHOWN, SIDES, Class, EvaluatedRun
from fdu.storage.output import whole_file, write_text

HEADINGS = {
    ("target", ""): "The target",
    ("unseen", ""): "The target in phrasings that the training never used",
    ("retained", "near"): "Its neighbours (to retain)",
    ("retained", "generic"): "The anchor, superclasses and everyday subjects (to retain)",
    ("retained", "unrelated"): "Unrelated subjects (to retain)",
    ("cross_domain", ""): "Classes of another kind (to retain)",
}
"""Heading of each role and group, in the order of the page."""
HEADINGS_OF_SEVERAL = {
    ("target", ""): "The targets",
    ("unseen", ""): "The targets in phrasings that the training never used",
    ("retained", "near"): "Their neighbours (to retain)",
    ("retained", "generic"): "The anchors, superclasses and everyday subjects (to retain)",
}
"""The headings that differ where several concepts were erased."""
SMALL_HEIGHT = 128
"""Pixels; larger images of other classes than the target are reduced to this on the page."""
REPORT, PICTURE = "report.html", "before-after.png"
"""The files of a report."""
WORDS = {"target": "the target", "unseen": "the target, unseen phrasings", **GROUPS, "cross_domain": "another kind"}
"""Roles and groups in the table of distances."""


def templates() -> Environment:
    """The templates in fdu/report/templates; values in HTML are escaped."""
    return Environment(
        loader=PackageLoader("fdu.report"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


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
class ShownImage:
    """An image on the page."""

    side: str
    """"before" or "after"."""
    source: str
    """A PNG data URI."""
    alt: str
    seen: str
    """The judge's answer."""
    right: bool
    """Whether the judge saw the requested class."""


@dataclasses.dataclass(frozen=True)
class ShownPair:
    """The images of one prompt and seed, before and after."""

    prompt: str
    images: tuple[ShownImage, ...]


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """A class, before and after."""

    role: str
    name: str
    before: Figure
    after: Figure
    pairs: list[ShownPair]
    """The shown images before and after."""
    large: bool
    """Whether the page shows it large: the only target, in all its phrasings."""


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
    apart = {name: Figure.of(evaluation, f"difference.{name}", value) for name, value in evaluation.difference.items()}
    return environment.get_template("report.html.j2").render(
        target=run.target,
        targets=run.targets,
        became=became_chart(evaluation.after.became) if len(run.targets) > 1 else None,
        anchor=run.anchor,
        others=joined([name for name, _ in run.erased]) if run.anchor is None else "",
        evaluation=evaluation,
        verdict=judge(evaluation, run.asked),
        steps=next_steps(run),
        help_pages=help_pages(run),
        holds=judge_robustness(run.robustness, run.target) if run.robustness else None,
        summary=[(row, apart.get(row.figure)) for row in comparison(evaluation, run.asked)],
        groups=groups,
        shape=run.images["before"][0].shape[:-3:-1],
        classes=[row for _, rows in groups for row in rows if row.role != "unseen"],
        canvas=[
            (one.title, one.meaning, Figure.of(evaluation, one.name, evaluation.unlearn_canvas[one.title]))
            for one in metrics_of(ShareMetric)
            if one.title in evaluation.unlearn_canvas
        ],
        distances=_distances(evaluation),
        robustness=_robustness(run.robustness) if run.robustness else None,
        charts=training_charts(record["history"]) if record else [],
        settings=setting_rows(record["config"]) if record else [],
        shown=min(SHOWN, evaluation.images_per_class),
        commands=[("The erasure:", (record or {}).get("command", "")), ("This report:", run.command)],
        facts=[("The erasure", _erasure_facts(record) if record else []), ("The evaluation", _evaluation_facts(run))],
        notes=run.notes,
    )


def setting_rows(config: Mapping[str, Any], without: Collection[str] = ()) -> list[tuple[str, str, bool]]:
    """Name and value of each setting of an erasure, and whether it differs from the default.

    Args:
        config: :meth:`fdu.EraseConfig.as_dict`, or the settings in a record.
        without: settings to leave out.
    """
    defaults = EraseConfig().as_dict()

    def plain(value: Any) -> str:
        return ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)

    return [
        (name, plain(value), plain(value) != plain(defaults.get(name, value)))
        for name, value in updated(config).items()
        if name not in without
    ]


def _unbroken(text: str) -> str:
    """The text with no-break spaces in percentages."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _points(difference: float) -> str:
    """A difference of shares as whole percentage points, with its sign."""
    points = f"{100 * difference:+.0f}"
    return "0" if float(points) == 0 else points.replace("-", "\N{MINUS SIGN}")


def _erasure_facts(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Facts of an erasure's record besides its settings."""
    return [
        ("duration of the erasure", f"{record['seconds']:.1f} s"),
        *([("sigma", f"{record['sigma']:.4g}")] if record.get("sigma") else []),
        *(
            (f"closed form of the {one['input']}", f"rank {one['rank']}, relative error {one['error']:.1g}")
            for one in record.get("edits", ())
        ),
        ("fingerprint of the base weights", (record.get("fingerprint") or "unknown")[:16]),
        *record["versions"].items(),
    ]


def _evaluation_facts(run: EvaluatedRun) -> list[tuple[str, Any]]:
    """How the images were drawn and judged, as far as known."""
    conditions = run.conditions
    sampling = conditions.sampling.settings() if conditions.sampling else {}
    facts = [
        ("judge", conditions.judge or None),
        ("prompts", conditions.prompts or None),
        *((name, "the pipeline's own" if value is None else value) for name, value in sampling.items()),
        ("height and width", conditions.size and "{} x {}".format(*conditions.size)),
        ("seed of the first image", conditions.seed),
        ("dtype", conditions.dtype or None),
        ("device", run.device or None),
        *conditions.versions.items(),
    ]
    return [(name, value) for name, value in facts if value is not None]


def _groups(run: EvaluatedRun) -> list[tuple[str, list[ClassRow]]]:
    """The rows of classes under their headings."""
    found: dict[tuple[str, str], list[ClassRow]] = {key: [] for key in HEADINGS}
    for place, probe in enumerate(run.probes):
        name = "unseen_accuracy" if probe.role == "unseen" else f"per_class.{probe.name}"
        sides = (run.evaluation.before, run.evaluation.after)
        before, after = (Figure.of(side, name, side.value(name)) for side in sides)
        large = len(run.targets) == 1 and probe.role in ("target", "unseen")
        pairs = _pairs(probe, {side: run.images[side][place] for side in SIDES}, large)
        key = (probe.role, probe.group if probe.role == "retained" else "")
        found[key].append(ClassRow(probe.role, probe.name, before, after, pairs, large))
    headings = HEADINGS if len(run.targets) == 1 else {**HEADINGS, **HEADINGS_OF_SEVERAL}
    return [(headings[key], rows) for key, rows in found.items() if rows]


def _pairs(probe: Class, images: Mapping[str, Tensor], large: bool) -> list[ShownPair]:
    """The shown images of a class, pair by pair; ``large`` ones are as large as they are stored."""
    height = KEPT_HEIGHT if large else SMALL_HEIGHT

    def image(side: str, place: int) -> ShownImage:
        prompt, seen = probe.prompts[place % len(probe.prompts)], probe.seen[side][place]
        alt = f"{side} the erasure, for the prompt {prompt!r}; the judge saw {seen}"
        picture = strip(images[side][place : place + 1], height=height).convert("RGB")
        return ShownImage(side, data_uri(picture), alt, seen, seen == probe.name)

    return [
        ShownPair(probe.prompts[place % len(probe.prompts)], tuple(image(side, place) for side in SIDES))
        for place in range(len(probe.seen["before"]))
    ]


def _distances(evaluation: Evaluation) -> dict[str, Any] | None:
    """The table of distances and CLIP scores: columns, and rows of (name, figures)."""
    columns = distance_columns(evaluation)
    rows = [
        (WORDS[part], [Figure(*values[part]) if part in values else None for _, _, values in columns])
        for part in PARTS
        if any(part in values for _, _, values in columns)
    ]
    heads = [(title, metric.meaning) for title, metric, _ in columns]
    return {"columns": heads, "rows": rows, "scored": bool(evaluation.after.clip_score)} if rows else None


def _robustness(found: Mapping[str, Any]) -> dict[str, Any]:
    """The robustness tests for the page."""
    drawn: list[Captioned] = []
    if found.get("attack"):
        attacked, before = found["attack"], found.get("attack_before")
        courses = []
        if before:
            courses.append(("before the erasure", "reference", _course(before)))
        others = [number for number in range(len(attacked["attempts"])) if number != attacked["chosen"]]
        courses += [(f"erased, attempt {number + 1}", "raw", _course(attacked, number)) for number in others]
        courses.append(("erased", "smooth", _course(attacked)))
        explanation = "share of images that show the target, by steps of the attack; dashed: before the erasure"
        drawn.append(share_chart("Attack on the embeddings", explanation, courses))
    if found.get("relearning"):
        course = found["relearning"]["course"]
        explanation = "share of images that show the target, by steps of fine-tuning on its images"
        drawn.append(share_chart("Relearning", explanation, [("erased", "smooth", course)]))
    return {**Robustness().as_dict(), **found, "charts": drawn}


def _course(attacked: Mapping[str, Any], number: int | None = None) -> list[tuple[int, Mapping[str, Any]]]:
    """The shares by step of one attempt, by default the chosen one, starting before the attack."""
    attempt = attacked["attempts"][attacked["chosen"] if number is None else number]
    return [(0, attacked["before"]), *attempt["course"]]


def write_report(path: str | Path, run: EvaluatedRun) -> Path:
    """Write only the page of a run, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    write_text(path, render(run))
    return path


def write_run(folder: Path, run: EvaluatedRun) -> None:
    """Write metrics, images, page and picture of a run into a folder.

    Raises:
        OSError: the folder cannot be written.
    """
    run.write(folder)
    make_report(folder)


def make_report(folder: str | Path) -> Path:
    """Regenerate page and picture from a folder that :meth:`EvaluatedRun.write` wrote, each whole or not at all.

    Raises:
        FileNotFoundError, ValueError: not such a folder, or parts of it are missing or wrong.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    run = EvaluatedRun.read(folder)
    page, (before, after) = render(run), (Draws(run.images[side]) for side in SIDES)
    with whole_file(folder / REPORT) as page_file, whole_file(folder / PICTURE) as picture_file:
        page_file.write_text(page, encoding="utf-8")
        before_after(before, after, run.asked, run.evaluation).save(picture_file, "PNG", optimize=True)
    return folder / REPORT
