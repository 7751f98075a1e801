"""The page of a comparison: one self-contained HTML file, its charts as SVG files, and its table in Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fdu_kernels as fk
from fdu.comparison.chart import COLOURS, Curve, Key, curve_chart, curve_entries, front_chart, mark
from fdu.comparison.front import FIGURES, Estimate, Standing
from fdu.comparison.plan import KL_BY_ALPHA
from fdu.comparison.recommendation import Preference
from fdu.comparison.results import Results
from fdu.report.render import setting_rows
from fdu.report.templating import templates
from fdu.storage.output import write_text

PAGE, TABLE, PICTURE = "comparison.html", "comparison.md", "{}.svg"
"""Names of the files."""
FRONT, CHANGE, BY_ALPHA = "front", "change", "alpha-s0-{}"
"""Names of the charts."""
FEWEST_ALPHAS = 3
"""Fewest values of alpha for a chart."""
Alike = Mapping[str, str]
"""Divergences that were not run, each with the one that trains the same model."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A chart: inline, and as a file."""

    name: str
    title: str
    explanation: str
    inline: str
    whole: str
    legend: list[tuple[str, str]]


def write_page(
    folder: Path,
    results: Results,
    prefer: Preference,
    alike: Alike | None = None,
    command: str = "",
    erase_command: str = "",
    notes: Sequence[str] = (),
) -> None:
    """Write page, table and charts into ``folder``, each whole or not at all; outdated charts are removed.

    Args:
        folder: an existing folder.
        results: the figures of the records.
        prefer: the preference whose recommendation comes first.
        alike: divergences that were not run, as :func:`fdu.comparison.plan.distinct` gives them.
        command: the command line that regenerates the comparison.
        erase_command: the command line of the recommended erasure.
        notes: paragraphs to end with.
    """
    alike = alike or {}
    drawn = pictures(results, alike)
    key = Key(results.standings)
    comparison = results.comparison
    varied = {"divergence", "s0", "seed", *(name for one in comparison.candidates for name, _ in one.others)}
    facts = [
        ("runs", len(comparison.runs())),
        ("seeds", ", ".join(map(str, comparison.seeds))),
        ("time per erasure", f"{results.seconds:.1f} s"),
        ("images of the target", f"2 x {comparison.drawing.images_of_target}"),
        ("images per other class", comparison.drawing.images_per_class),
        ("device", results.conditions["device"]),
        *results.conditions["versions"].items(),
    ]
    page = (
        templates()
        .get_template("comparison/page.html.j2")
        .render(
            results=results,
            comparison=comparison,
            chosen=results.recommendations[prefer],
            rows=[
                (mark(key.shape(one), 7, 7, key.colour(one), hollow=not one.on_front), one, also(one, alike))
                for one in ordered(results.standings)
            ],
            pictures=drawn,
            percent=percent,
            commands=[("The recommended erasure:", erase_command), ("This comparison:", command)],
            facts=[("", facts)],
            settings=setting_rows(comparison.base.as_dict(), without=varied),
            notes=[*([results.mixed_note] if results.mixed else []), *notes],
        )
    )
    charts = {PICTURE.format(one.name): one.whole for one in drawn}
    for name, text in {PAGE: page, TABLE: table(results.standings, alike), **charts}.items():
        write_text(folder / name, text)
    for kind in (CHANGE, BY_ALPHA.format("*")):
        for path in folder.glob(PICTURE.format(kind)):
            if path.name not in charts:
                path.unlink()


def pictures(results: Results, alike: Alike) -> list[Picture]:
    """The charts that the results allow."""
    standings = results.standings
    entries = Key(standings).entries()
    found = [
        Picture(
            FRONT,
            "Erased against retained",
            "Up and to the right is better. Filled marks lie on the Pareto front: no other candidate both erases and "
            "retains more. Crosses are 95 % intervals.",
            front_chart(standings),
            front_chart(standings, whole=True),
            entries,
        )
    ]
    if not np.isnan(results.sample.values["change"]).any():
        found.append(
            Picture(
                CHANGE,
                "Erased against the change of other classes",
                "Down and to the right is better. Pixels change before the judge sees a wrong class, so this chart "
                "separates candidates that retain everything.",
                front_chart(standings, "change"),
                front_chart(standings, "change", whole=True),
                entries,
            )
        )
    for s0, points in alphas(standings, alike).items():
        if len(points) < FEWEST_ALPHAS:
            continue
        curves = [
            Curve(name, [(alpha, getattr(one, name)) for alpha, one in points], colour)
            for name, colour in (("erased", COLOURS[1]), ("retained", COLOURS[0]))
        ]
        drawn = [curve_chart(curves, "alpha", "share of images (%)", whole) for whole in (False, True)]
        explanation = "alpha and 1 - alpha have the same loss between Gaussians, so the curves are symmetric about 1/2."
        title = f"By alpha, s0 {s0:g}"
        name = BY_ALPHA.format(f"{s0:g}")
        found.append(Picture(name, title, explanation, drawn[0], drawn[1], curve_entries(curves)))
    return found


def alphas(standings: Sequence[Standing], alike: Alike) -> dict[float, list[tuple[float, Standing]]]:
    """By s0, the candidates that are alpha divergences, or train the same model as one, in the order of alpha."""
    found: dict[float, dict[float, Standing]] = {}
    for one in standings:
        if one.candidate.others:
            continue
        for name in (one.candidate.divergence, *also(one, alike)):
            alpha = alpha_of(name)
            if alpha is not None:
                found.setdefault(one.candidate.s0, {})[alpha] = one
    return {s0: sorted(points.items()) for s0, points in found.items()}


def alpha_of(name: str) -> float | None:
    """The alpha of a divergence by name; None if it is not an alpha divergence."""
    limits = {limit: alpha for alpha, limit in KL_BY_ALPHA.items()}
    divergence = fk.get_divergence(name)
    if divergence.name == "alpha":
        return float(dict(divergence.parameters)["alpha"])
    return limits.get(divergence.name)


def also(standing: Standing, alike: Alike) -> list[str]:
    """The requested divergences that train the same model as this candidate."""
    return [name for name, run in alike.items() if run == standing.candidate.divergence]


def ordered(standings: Sequence[Standing]) -> list[Standing]:
    """The front first, then by the erased share."""
    return sorted(standings, key=lambda one: (not one.on_front, -one.erased.value))


def table(standings: Sequence[Standing], alike: Alike | None = None) -> str:
    """All candidates as a Markdown table."""
    rows = []
    for one in ordered(standings):
        names = "".join(f", same as {name}" for name in also(one, alike or {}))
        front = f"{'yes' if one.on_front else 'no'} ({100 * one.front_share:.0f} %)"
        figures = [percent(one.erased), percent(one.retained), percent(one.change, 2)]
        rows.append([one.candidate.label + names, *figures, front])
    return markdown(["candidate", "erased", "retained", "change of other classes", "on the front"], rows) + "\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def percent(share: Estimate, digits: int = 1) -> str:
    """A share with its interval, in percent."""
    if share.value != share.value:
        return "-"
    # Adding 0 makes 0 of -0.
    value, low, high = (round(100 * one, digits) + 0.0 for one in (share.value, share.low, share.high))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def describe(results: Results) -> dict[str, Any]:
    """The figures and the recommendations, ready for JSON."""
    return {
        "candidates": [
            {**one.candidate.settings, **{name: dataclasses.asdict(getattr(one, name)) for name in FIGURES}}
            | {"on_front": one.on_front, "front_share": one.front_share}
            for one in results.standings
        ],
        "recommendations": {
            prefer: {"settings": one.candidate.settings, "certain": one.certain, "why": [one.headline, *one.sentences]}
            for prefer, one in results.recommendations.items()
        },
        "failed": results.failed,
        **results.conditions,
        "mixed": list(results.mixed),
    }
