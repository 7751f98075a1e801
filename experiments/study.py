"""Divergences against each other on the pipelines of fdu, and the paper's claims about them; writes docs/results.md.

    python experiments/study.py        # resumes where it was stopped

Takes about four hours of two cores, shared by ``--workers`` processes.

On the emoji pipeline, six targets and three seeds: the divergences in short runs without preservation and in whole runs
with the defaults; and the min-max game against the exact divergence. The digits pipeline has short runs and games only.
Pictures along the fronts are drawn on the machine that made the runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import many
import methods
from claims import CLAIMS, Contrasts, summary, told, verdict, weigh
from experiment import DRAWING, HERE, NOT_MEASURED, Suite, all_jobs, fill, run, told_of
from outcomes import ASKED, COLUMNS, KEPT, LEFT, Outcome, bounds, compared, outcomes

from fdu.comparison.front import Estimate, Standing
from fdu.comparison.gallery import drawn_gallery, galleries
from fdu.comparison.page import COLOURS, Curve, alphas, curve_chart, front_chart, markdown, percent, table
from fdu.comparison.plan import Candidate, Comparison, Drawing, distinct, slug
from fdu.comparison.results import Results
from fdu.comparison.sweep import Job, Records
from fdu.config import EraseConfig
from fdu.report.charts import Chart
from fdu.storage.output import whole_file, write_text

PAIRS = {
    "emoji": (
        ("fox", "wolf"),
        ("orange", "lemon"),
        ("strawberry", "fruit"),
        ("owl", "bird"),
        ("twemoji", "noto"),
        ("cat", "dog"),
    ),
    "digits": (("three", "eight"), ("seven", "eight"), ("red", "green")),
}
"""Targets and anchors by pipeline. Emoji: two hard neighbours, two superclasses, a style, and a target with synonyms
(kitten, kitty). Digits: two digits and an ink, each towards another class, where chance does not blur what is left."""
DIVERGENCES = ("mse", "squared_hellinger", "jensen_shannon", "le_cam", "alpha:1.5", "pearson_chi2")
"""From damping large errors to amplifying them. kl trains the same model as mse, and alpha:0.3 nearly the same as
squared_hellinger, so they are left out."""
MORE_ALPHAS = ("alpha:1.25", "alpha:2.5", "alpha:3")
SAME_AS = distinct((*DIVERGENCES, *MORE_ALPHAS, "kl", "alpha:0.5", "alpha:2"))[1]
"""Seven values of alpha, with those that train the same model as another divergence."""
S0 = (0.3, 1.0, 10.0)
SEEDS = (0, 1, 2)
GAME_DIVERGENCES = ("kl", "jensen_shannon", "squared_hellinger")
STEPS = (20, 40, 80)
SHORT = EraseConfig(max_train_steps=40, preservation_weight=0.0, learning_rate=2e-3)
STEADY = EraseConfig(preservation_weight=0.0, lr_scheduler="constant", learning_rate=1e-3)
"""At a constant learning rate a run of 20 steps is the beginning of one of 80."""
EMOJI = DRAWING["emoji"]
DIGITS = Drawing(images_per_class=32, images_of_target=96, num_inference_steps=12)
DRAWINGS = {"emoji": EMOJI, "digits": DIGITS}
"""How the judged images are drawn; chance blurs what is left of a digit."""
MOST_PICTURED = 6
"""Rows of pictures along the front of a target."""


def suites(model: str) -> dict[str, Suite]:
    """The suites of a pipeline: "short", "games" and, of the emoji, "whole"."""
    exact = [Candidate(divergence, s0) for s0 in S0 for divergence in DIVERGENCES]
    if model == "emoji":
        exact += [Candidate(divergence) for divergence in MORE_ALPHAS]
    games = [
        Candidate(divergence, 1.0, (*game, ("max_train_steps", count)))
        for count in STEPS
        for divergence in GAME_DIVERGENCES
        for game in ((), (("variational", True),))
    ]
    whole = [Candidate(divergence) for divergence in DIVERGENCES]
    plan = {"short": (exact, SHORT), "games": (games, STEADY), "whole": (whole, EraseConfig())}

    def suite(name: str) -> Suite:
        candidates, base = plan[name]
        pairs = PAIRS[model][:1] if name == "games" else PAIRS[model]
        comparison = Comparison(model, pairs, tuple(candidates), SEEDS, base, drawing=DRAWINGS[model])
        return Suite(f"{model}-{name}", comparison)

    return {name: suite(name) for name in plan if model == "emoji" or name != "whole"}


def jobs(cache: Path) -> list[Job]:
    """The jobs of all suites."""
    return all_jobs([suite for model in PAIRS for suite in suites(model).values()], cache)


Found = Mapping[str, Mapping[str, Results | None]]
"""Results by pipeline and suite; None for those that cannot be compared yet."""


def write_page(results: Path, docs: Path) -> None:
    """Write page, charts and pictures from the records that are up to date; nothing before the short runs of the emoji
    have a complete seed."""
    records = Records(results / "study.jsonl")
    every = {model: suites(model) for model in PAIRS}
    found = {model: {name: one.results(records) for name, one in each.items()} for model, each in every.items()}
    short, games = found["emoji"]["short"], found["emoji"]["games"]
    if short is None:
        return
    # More alphas than there are colours have a chart of their own.
    fronts = [one for one in short.standings if one.candidate.divergence not in MORE_ALPHAS]
    charts = {"front": front_chart(fronts), "alpha": alpha_chart(short)}
    if games is not None:
        charts["variational"] = curve_chart(curves(games), "steps", "share of the target's images that show it (%)")
    for name, chart in charts.items():
        write_text(docs / "results" / f"{name}.svg", chart.svg(whole=True))
    became = {name: outcomes(every["emoji"][name], records, found["emoji"][name]) for name in ("short", "whole")}
    draw_fronts(short, became["short"], docs / "results")
    listed = [suite for each in every.values() for suite in each.values()]
    said = told_of(listed, records, [one for each in found.values() for one in each.values()])
    said |= {"elsewhere": f"{methods.told(results)}\n\n{many.told(results)}"}
    write_text(docs / "results.md", page(found, became, said))


def page(found: Found, became: Mapping[str, Mapping[str, Outcome]], said: Mapping[str, str]) -> str:
    """docs/results.md.

    Args:
        found: the results; the short runs of the emoji are there.
        became: by suite and target, what became of the target.
        said: what every page says of its runs.
    """
    short, whole, games = (found["emoji"][name] for name in ("short", "whole", "games"))
    digits = found["digits"]["short"]
    assert short is not None
    samples = {
        model: {name: one.sample if one else None for name, one in each.items()} for model, each in found.items()
    }
    curve = (
        "![What is left of the target against steps, exact (full) and variational (dashed)](results/variational.svg)"
    )
    return fill(
        "results.md",
        **said,
        core_seconds=short.core_seconds,
        pairs=", ".join(f"{target} to {anchor}" for target, anchor in PAIRS["emoji"]),
        digits_pairs=", ".join(f"{target} to {anchor}" for target, anchor in PAIRS["digits"]),
        seeds=len(SEEDS),
        short=short.comparison,
        drawing=EMOJI,
        digits_drawing=DIGITS,
        compared=compared(short),
        claims=summary(samples),
        table=table(short.standings, SAME_AS).strip(),
        untouched=untouched(short),
        emptied=emptied(became["short"]),
        whole=f"{table(whole.standings).strip()}\n\n{compared(whole)}".strip() if whole else NOT_MEASURED,
        bounds=bounds({"whole runs": became["whole"]}) if whole else NOT_MEASURED,
        left=f"{100 * LEFT:.0f}",
        kept=f"{100 * KEPT:.0f}",
        asked=f"{100 * ASKED:.0f}",
        recommendations=recommended(whole) if whole else "",
        games=f"{curve}\n\n{table(games.standings).strip()}\n\n{compared(games)}".strip() if games else NOT_MEASURED,
        digits_front=told_front(digits.standings) if digits else NOT_MEASURED,
        by_target="\n\n".join(by_target(target, anchor, became) for target, anchor in PAIRS["emoji"]),
        **{
            name: "\n\n".join(judged(model, weigh(claim, samples[model])) for model in samples)
            for name, claim in CLAIMS.items()
        },
    )


def judged(model: str, contrasts: Contrasts) -> str:
    """The verdict on a claim on one pipeline, and its comparisons."""
    return f"**{model.capitalize()}: {verdict([one.bears for one in contrasts])}.**\n\n{told(contrasts)}".strip()


def recommended(results: Results) -> str:
    """The recommendations, by preference."""
    lines = (
        f"* **{prefer}**: {one.headline}. {' '.join(one.sentences)}" for prefer, one in results.recommendations.items()
    )
    return "\n".join(["Recommendations, by preference:", "", *lines])


def untouched(results: Results) -> str:
    """The figures of the table before any erasure, as means over the targets."""
    own, others, asked = (100 * fmean(figures) for figures in zip(*results.before.values(), strict=True))
    return f"erased {100 - own:.1f}, retained {others:.1f}, attributes {asked:.1f}"


def emptied(became: Mapping[str, Outcome]) -> str:
    """The share of the candidates that left nothing of a target with any seed, in percent."""
    found = {
        target: fmean(own.all.estimate("erased", one).value == 1 for one in own.candidates)
        for target, own in became.items()
    }
    return ", ".join(f"{target} {100 * share:.0f} %" for target, share in found.items())


def told_front(standings: tuple[Standing, ...]) -> str:
    """The candidates on the front in a sentence."""
    on_front = sorted((one for one in standings if one.on_front), key=lambda one: -one.erased.value)
    figures = (
        f"{one.candidate.label} erased {percent(one.erased)} % and retained {percent(one.retained)} %"
        for one in on_front
    )
    return f"On the front: {'; '.join(figures)}."


def by_target(target: str, anchor: str, became: Mapping[str, Mapping[str, Outcome]]) -> str:
    """What became of one target at s0 = 1, in short and in whole runs, and the pictures along its front."""
    first = next((own[target] for own in became.values() if target in own), None)
    rows = [["not erased", "", *first.cells_before]] if first else []
    rows += [
        [name, one.divergence, *own[target].cells(one)]
        for name, own in became.items()
        if target in own
        for one in own[target].candidates
        if one.s0 == 1.0
    ]
    said = markdown(["runs", "divergence", *COLUMNS], rows) if rows else NOT_MEASURED
    picture = f"front-{slug(target)}.png"
    there = (HERE.parent / "docs" / "results" / picture).is_file()
    shown = f"\n\n![Pictures along the front of {target}](results/{picture})" if there else ""
    return f"### {target.capitalize()} to {anchor}\n\n{said}{shown}"


def alpha_chart(short: Results) -> Chart:
    """Erased, retained and attributes against alpha, at s0 = 1."""
    points = alphas(short.standings, SAME_AS)[1.0]
    figures = {"erased": COLOURS[1], "retained": COLOURS[0], "attributes": COLOURS[2]}
    lines = [
        Curve(name, [(alpha, getattr(one, name)) for alpha, one in points], colour) for name, colour in figures.items()
    ]
    return curve_chart(lines, "alpha", "share of images (%)")


def draw_fronts(short: Results, became: Mapping[str, Outcome], folder: Path) -> None:
    """The pictures along the front of each target, where this machine has made the runs of the first seed."""
    for target, own in became.items():
        best: dict[tuple[float, float], Standing] = {}
        for one in own.all.standings():
            if one.on_front:
                best.setdefault((round(one.erased.value, 2), round(one.retained.value, 2)), one)
        spread = sorted(best.values(), key=lambda one: one.erased.value)
        step = max((len(spread) - 1) / (MOST_PICTURED - 1), 1)
        chosen = [spread[round(step * place)] for place in range(min(len(spread), MOST_PICTURED))]
        along = dataclasses.replace(short, sample=own.all, standings=tuple(chosen))
        rows = galleries(HERE / "cache" / "emoji-short", along, chosen[-1].candidate).get(target)
        if rows and all(row.tiles for row in rows):
            with whole_file(folder / f"front-{slug(target)}.png") as fresh:
                drawn_gallery(rows).save(fresh, "PNG", optimize=True)


def curves(games: Results) -> list[Curve]:
    """The share of the target that is left against steps: one curve per divergence, exact and variational."""
    found: dict[str, Curve] = {}
    colours = dict(zip(GAME_DIVERGENCES, COLOURS, strict=False))
    for one in games.sample.candidates:
        others, erased = dict(one.others), games.sample.estimate("erased", one)
        game = "variational" in others
        name = f"{one.divergence}{', variational' if game else ''}"
        curve = found.setdefault(name, Curve(name, [], colours[one.divergence], dashed=game))
        left = Estimate(1 - erased.value, 1 - erased.high, 1 - erased.low)
        curve.points.append((others["max_train_steps"], left))
    return list(found.values())


if __name__ == "__main__":
    run(__doc__, "study", jobs, write_page)
