"""The page of a comparison: one self-contained HTML file, its charts, also as SVG files, and its table in Markdown."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

import fdu_kernels as fk
from fdu.comparison.front import Estimate, Standing, undominated
from fdu.comparison.gallery import drawn_gallery, galleries
from fdu.comparison.plan import KL_BY_ALPHA, slug
from fdu.comparison.recommendation import WEIGHTS, Preference
from fdu.comparison.results import Results
from fdu.report.charts import Captioned, Chart, Scale, mark
from fdu.report.render import setting_rows, templates
from fdu.storage.output import whole_file, write_text

PAGE, TABLE, PICTURE = "comparison.html", "comparison.md", "{}.svg"
"""Names of the files."""
GALLERY = "front.png"
"""The pictures along the front; of further targets, front-NAME.png."""
FRONT, CHANGE, HELD, BY_ALPHA = "front", "change", "held", "alpha-s0-{}"
"""Names of the charts."""
FEWEST_ALPHAS = 3
"""Fewest values of alpha for a chart."""
SameAs = Mapping[str, str]
"""Divergences that were not run, each with the one that trains the same model."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8860b", "#cc79a7", "#4aa3d9", "#7a5195", "#5f6b6d")
"""Colours of the divergences: those of Okabe and Ito, slightly darker; colour-blind readers can tell them apart."""
SHAPES = ("circle", "square", "triangle", "diamond")
"""Shapes of the marks for s0 and other settings."""
AXES = {
    "erased": "target erased (%)",
    "retained": "other classes retained (%)",
    "change": "change of other classes (% of pixel range)",
    "held": "target erased under attack (%)",
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A figure as a function of a number."""

    name: str
    points: Sequence[tuple[float, Estimate]]
    """Shares, in the order of the number."""
    colour: str
    dashed: bool = False


class Key:
    """The mark of each candidate: its colour stands for the divergence, its shape for all other settings."""

    def __init__(self, standings: Sequence[Standing]) -> None:
        self.colours = dict(zip(dict.fromkeys(self._hue(one) for one in standings), itertools.cycle(COLOURS)))
        self.shapes = dict(zip(dict.fromkeys(one.candidate.variant for one in standings), itertools.cycle(SHAPES)))

    def mark(self, standing: Standing, x: float, y: float, hollow: bool) -> str:
        """A candidate's mark; hollow if it is dominated."""
        candidate = standing.candidate
        return mark(self.shapes[candidate.variant], x, y, self.colour(standing), hollow)

    def colour(self, standing: Standing) -> str:
        """A candidate's colour."""
        return self.colours[self._hue(standing)]

    @staticmethod
    def _hue(standing: Standing) -> str:
        """What a colour stands for: the divergence, or a method without one."""
        return standing.candidate.divergence if standing.candidate.trains else standing.candidate.label

    def entries(self) -> list[tuple[str, str]]:
        """Marks around the origin and their meanings."""
        colours = [(mark("circle", 0, 0, colour), name) for name, colour in self.colours.items()]
        shapes = [(mark(shape, 0, 0, "currentColor"), name) for name, shape in self.shapes.items()]
        return colours + (shapes if len(shapes) > 1 else [])


def write_page(
    folder: Path,
    results: Results,
    prefer: Preference,
    same_as: SameAs | None = None,
    command: str = "",
    next_commands: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write page, table, charts and pictures into ``folder``, each whole or not at all; outdated ones are removed.

    Args:
        folder: an existing folder, with the pictures of the runs if there are some.
        results: the figures of the records.
        prefer: the preference whose recommendation comes first.
        same_as: divergences that were not run, as :func:`fdu.comparison.plan.distinct` gives them.
        command: the command line that regenerates the comparison.
        next_commands: the command lines of the recommended erasure and of its evaluation; empty without one.
        notes: paragraphs to end with.
    """
    same_as = same_as or {}
    drawn = pictures(results, same_as)
    key = Key(results.standings)
    comparison = results.comparison
    shown = galleries(folder, results, results.recommendations[prefer].candidate)
    facts = [
        ("runs", len(comparison.runs())),
        ("seeds", ", ".join(map(str, comparison.seeds))),
        ("time per erasure", f"{results.seconds:.1f} s"),
        ("images of the target", f"2 x {comparison.drawing.images_of_target}"),
        ("images per other class", comparison.drawing.images_per_class),
        ("prompts", comparison.origin),
        ("device", results.conditions["device"]),
        *results.conditions["versions"].items(),
    ]
    page = (
        templates()
        .get_template("comparison.html.j2")
        .render(
            results=results,
            comparison=comparison,
            chosen=results.recommendations[prefer],
            weights=WEIGHTS,
            rows=[
                (key.mark(one, 7, 7, hollow=not one.on_front), one, also(one, same_as))
                for one in ordered(results.standings)
            ],
            pictures=drawn,
            galleries=shown,
            mark=lambda one: key.mark(one, 7, 7, hollow=not one.on_front),
            percent=percent,
            with_attributes=tells_attributes(results.standings),
            with_held=tells_held(results.standings),
            next_commands=next_commands,
            commands=[("This comparison:", command)],
            facts=[("", facts)],
            settings=setting_rows(comparison.shared_settings(), without=comparison.varied),
            notes=[*([results.mixed_note] if results.mixed else []), *notes],
        )
    )
    charts = {PICTURE.format(one.name): one.chart.svg(whole=True) for one in drawn}
    for name, text in {PAGE: page, TABLE: table(results.standings, same_as), **charts}.items():
        write_text(folder / name, text)
    for place, (target, _) in enumerate(comparison.pairs):
        path = folder / (f"{FRONT}-{slug(target)}.png" if place else GALLERY)
        if target not in shown:
            path.unlink(missing_ok=True)
            continue
        with whole_file(path) as fresh:
            drawn_gallery(shown[target]).save(fresh, "PNG", optimize=True)
    for kind in (CHANGE, HELD, BY_ALPHA.format("*")):
        for path in folder.glob(PICTURE.format(kind)):
            if path.name not in charts:
                path.unlink()


def pictures(results: Results, same_as: SameAs) -> list[Captioned]:
    """The charts that the results allow."""
    captions = {
        "retained": (
            FRONT,
            "Erased against retained",
            "Up and to the right is better. Filled marks lie on the Pareto front: no other candidate both erases and "
            "retains more. Crosses are 95 % intervals.",
        ),
        "change": (
            CHANGE,
            "Erased against the change of other classes",
            "Down and to the right is better. Pixels change before the judge sees a wrong class, so this chart "
            "separates candidates that retain everything.",
        ),
        "held": (
            HELD,
            "Erased against what holds under attack",
            "Up and to the right is better. An attack moves the prompt's embeddings until the target is drawn again.",
        ),
    }
    found = [
        Captioned(title, explanation, front_chart(results.standings, figure), name)
        for figure, (name, title, explanation) in captions.items()
        if not np.isnan(results.sample.values[figure]).any()
    ]
    explanation = "alpha and 1 - alpha have the same loss between Gaussians, so the curves are symmetric about 1/2."
    for s0, points in alphas(results.standings, same_as).items():
        if len(points) >= FEWEST_ALPHAS:
            curves = [
                Curve(name, [(alpha, getattr(one, name)) for alpha, one in points], colour)
                for name, colour in (("erased", COLOURS[1]), ("retained", COLOURS[0]))
            ]
            chart = curve_chart(curves, "alpha", "share of images (%)")
            found.append(Captioned(f"By alpha, s0 {s0:g}", explanation, chart, BY_ALPHA.format(f"{s0:g}")))
    return found


def alphas(standings: Sequence[Standing], same_as: SameAs) -> dict[float, list[tuple[float, Standing]]]:
    """By s0, the candidates that are alpha divergences, or train the same model as one, in the order of alpha."""
    limits = {limit: alpha for alpha, limit in KL_BY_ALPHA.items()}
    found: dict[float, dict[float, Standing]] = {}
    for one in standings:
        if one.candidate.others:
            continue
        for divergence in map(fk.get_divergence, (one.candidate.divergence, *also(one, same_as))):
            alpha = dict(divergence.parameters).get("alpha", limits.get(divergence.name))
            if alpha is not None:
                found.setdefault(one.candidate.s0, {})[float(alpha)] = one
    return {s0: sorted(points.items()) for s0, points in found.items()}


def also(standing: Standing, same_as: SameAs) -> list[str]:
    """The requested divergences that train the same model as this candidate."""
    return [name for name, run in same_as.items() if run == standing.candidate.divergence and standing.candidate.trains]


def ordered(standings: Sequence[Standing]) -> list[Standing]:
    """The front first, then by the erased share."""
    return sorted(standings, key=lambda one: (not one.on_front, -one.erased.value))


def tells_attributes(standings: Sequence[Standing]) -> bool:
    """Whether the prompts of a target ask for something besides it, and the records say what was found."""
    return not any(math.isnan(one.attributes.value) for one in standings)


def tells_held(standings: Sequence[Standing]) -> bool:
    """Whether the erased models were attacked."""
    return not any(math.isnan(one.held.value) for one in standings)


def table(standings: Sequence[Standing], same_as: SameAs | None = None) -> str:
    """All candidates as a Markdown table, with a column for attributes if the records tell them."""
    rows = []
    told, held = tells_attributes(standings), tells_held(standings)
    for one in ordered(standings):
        names = "".join(f", same as {name}" for name in also(one, same_as or {}))
        front = f"{'yes' if one.on_front else 'no'} ({100 * one.front_share:.0f} %)"
        attributes = [percent(one.attributes)] if told else []
        figures = [percent(one.erased), percent(one.retained), *attributes, percent(one.change, 2)]
        figures += [percent(one.held)] if held else []
        rows.append([one.candidate.label + names, *figures, front])
    header = ["candidate", "erased", "retained", *(["attributes"] if told else []), "change of other classes"]
    return markdown([*header, *(["held"] if held else []), "on the front"], rows) + "\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def percent(share: Estimate, digits: int = 1) -> str:
    """A share with its interval, in percent."""
    if math.isnan(share.value):
        return "-"
    # Adding 0 makes 0 of -0.
    value, low, high = (round(100 * one, digits) + 0.0 for one in (share.value, share.low, share.high))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def front_chart(standings: Sequence[Standing], figure: str = "retained") -> Chart:
    """Erased against retained, or against the change of images, with intervals and the Pareto front.

    Args:
        standings: the candidates.
        figure: "retained" or "held" (more is better), or "change" (less is better).
    """
    key = Key(standings)
    xs = [_percent(one.erased) for one in standings]
    ys = [_percent(getattr(one, figure)) for one in standings]
    better, digits = (-1, 2) if figure == "change" else (1, 1)
    on_front = undominated(np.array([x.value for x in xs]), better * np.array([y.value for y in ys]))
    points = list(zip(standings, xs, ys, on_front, strict=True))
    chart = Chart(Scale.around(_ends(xs)), Scale.around(_ends(ys)), AXES["erased"], AXES[figure])
    dashes = 'fill="none" stroke="currentColor" stroke-opacity="0.55" stroke-dasharray="5 4"'
    chart.line(sorted((x.value, y.value) for _, x, y, on in points if on), dashes)
    for one, x, y, _ in points:
        style = f'fill="none" stroke="{key.colour(one)}" stroke-opacity="0.4" stroke-width="1.3"'
        chart.line(((x.low, y.value), (x.high, y.value)), style)
        chart.line(((x.value, y.low), (x.value, y.high)), style)
    for one, x, y, on in points:
        title = escape(f"{one.candidate.label}: erased {_words(x)}; {figure} {_words(y, digits)}")
        drawn = key.mark(one, *chart.place(x.value, y.value), hollow=not on)
        chart.parts.append(f"<g><title>{title}</title>{drawn}</g>")
    named = "; ".join(one.candidate.label for one, _, _, on in points if on)
    chart.summary = f"{AXES[figure]} against {AXES['erased']}, {len(standings)} candidates. On the front: {named}"
    chart.legend = key.entries()
    return chart


def curve_chart(curves: Sequence[Curve], x_label: str, y_label: str) -> Chart:
    """Shares with their intervals, in percent, as functions of a number."""
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
    chart.summary = f"{y_label} against {x_label}. " + ". ".join(
        f"{curve.name}: " + ", ".join(f"{x:g}: {_words(one)}" for x, one in points) for curve, points in scaled
    )
    chart.legend = [(mark("circle", 0, 0, curve.colour, curve.dashed), curve.name) for curve in curves]
    return chart


def _percent(share: Estimate) -> Estimate:
    return Estimate(100 * share.value, 100 * share.low, 100 * share.high)


def _words(percent: Estimate, digits: int = 1) -> str:
    return f"{percent.value:.{digits}f} % ({percent.low:.{digits}f} to {percent.high:.{digits}f})"


def _ends(estimates: Sequence[Estimate]) -> list[float]:
    return [end for one in estimates for end in (one.low, one.high)]
