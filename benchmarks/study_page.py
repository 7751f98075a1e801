"""The page of the study, ``docs/results.md``: the front, the table, and which claims hold, all from the records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import study_claims as claims
from markdown_table import markdown

from fdu.comparison.chart import COLOURS, Curve, curve_chart, front_chart
from fdu.comparison.front import Estimate, Sample, complete
from fdu.comparison.page import percent, table
from fdu.comparison.plan import Candidate, Comparison
from fdu.comparison.results import Results, read_results
from fdu.comparison.runs import read_record
from fdu.storage.output import write_text

PICTURES = "results"
"""The folder of the charts, beside the page."""


def write_page(suites: Mapping[str, Comparison], records: Path, docs: Path) -> None:
    """Write page and charts from the records that are there; nothing if no seed of all divergences is."""
    found: dict[str, Results | None] = {}
    for name, comparison in suites.items():
        try:
            found[name] = read_results(comparison, records / name)
        except ValueError as error:
            print(f"{name}: {error}")
            found[name] = None
    main, games = found["divergences"], found["variational"]
    if main is None:
        return
    pictures = docs.parent / PICTURES
    write_text(pictures / "front.svg", front_chart(main.standings, whole=True))
    write_text(pictures / "change.svg", front_chart(main.standings, "change", whole=True))
    if games is not None:
        chart = curve_chart(curves(games), "steps", "share of the target's images that show it (%)", whole=True)
        write_text(pictures / "variational.svg", chart)
    write_text(docs, page(main, games, suites, records))


def page(main: Results, games: Results | None, suites: Mapping[str, Comparison], records: Path) -> str:
    """The page's text."""
    comparison = main.comparison
    s0s = list(dict.fromkeys(one.s0 for one in comparison.candidates))
    divergences = list(dict.fromkeys(one.divergence for one in comparison.candidates))
    judged = [
        claims.dominance(main.sample, s0s),
        claims.keeps_best(main.sample, s0s, divergences),
        claims.larger_gradient(main.sample, s0s),
        claims.scale_decides(main.sample, s0s),
    ]
    if games is not None:
        judged += [claims.games_erase_faster(games.sample), claims.games_hurt_more(games.sample)]
    total = sum(len(one.runs()) for one in suites.values())
    made = sum(read_record(one, records / name, run) is not None for name, one in suites.items() for run in one.runs())
    conditions, config, drawing = main.conditions, comparison.base, comparison.drawing
    return PAGE.format(
        made=f"all {total}" if made == total else f"{made} of {total}",
        device=conditions["device"],
        core_seconds=main.core_seconds,
        mixed=f" {main.mixed_note}" if main.mixed else "",
        versions=", ".join(f"{name} {version}" for name, version in conditions["versions"].items() if name != "fdu"),
        pairs=", ".join(f"{target} to {anchor}" for target, anchor in comparison.pairs),
        steps=config.max_train_steps,
        batch=config.train_batch_size,
        learning_rate=f"{config.learning_rate:g}",
        seeds=len(comparison.seeds),
        compared=compared(main),
        images_of_target=drawing.images_of_target,
        images=drawing.images_per_class,
        inference_steps=drawing.num_inference_steps,
        verdicts="\n".join(f"| {one.title} | {one.verdict} |" for one in judged),
        table=table(main.standings).strip(),
        by_target=by_target(main),
        recommendations="\n".join(
            f"* **{prefer}**: {one.headline}. {' '.join(one.sentences)}" for prefer, one in main.recommendations.items()
        ),
        claims="\n\n".join(section(one) for one in judged),
        games=game_section(games),
        failed=failed(main, games),
    )


def compared(results: Results) -> str:
    """The seeds of every target that all candidates have, where these are not all."""
    whole = complete(results.runs, results.sample.candidates)
    blocks = {(target, seed) for target, _, seed in whole}
    wanted = len(results.comparison.pairs) * len(results.comparison.seeds)
    if len(blocks) == wanted:
        return ""
    return f" So far {len(blocks)} of {wanted} pairs of target and seed are complete, and the figures are theirs."


def by_target(results: Results) -> str:
    """What each candidate erased and retained, target by target."""
    whole = complete(results.runs, results.sample.candidates)
    targets = list(dict.fromkeys(target for target, _, _ in whole))
    samples = [
        Sample({key: run for key, run in whole.items() if key[0] == target}, results.sample.candidates)
        for target in targets
    ]
    header = ["candidate", *(f"{target}, {figure}" for target in targets for figure in ("erased", "retained"))]
    rows = [
        [one.label, *(percent(sample.estimate(name, one)) for sample in samples for name in ("erased", "retained"))]
        for one in results.sample.candidates
    ]
    return markdown(header, rows)


def section(claim: claims.Claim) -> str:
    """A claim, its verdict and what it rests on."""
    header = ["", "erased", "retained", "change", ""]
    verdict = claim.verdict[0].upper() + claim.verdict[1:]
    return f"### {claim.title}\n\n{claim.said}\n\n**{verdict}.**\n\n{markdown(header, claims.rows(claim))}"


def curves(games: Results) -> list[Curve]:
    """The share of the target that is left against steps: a curve a divergence, exact and variational."""
    found: dict[tuple[str, bool], list[tuple[float, Candidate]]] = {}
    for one in games.sample.candidates:
        others = dict(one.others)
        found.setdefault((one.divergence, "variational" in others), []).append((others["max_train_steps"], one))
    names = list(dict.fromkeys(divergence for divergence, _ in found))
    return [
        Curve(
            f"{divergence}{', variational' if game else ''}",
            [(steps, left(games.sample, one)) for steps, one in sorted(points, key=lambda point: point[0])],
            COLOURS[names.index(divergence)],
            dashed=game,
        )
        for (divergence, game), points in found.items()
    ]


def left(sample: Sample, candidate: Candidate) -> Estimate:
    """The share of the target's images that show it still."""
    erased = sample.estimate("erased", candidate)
    return Estimate(1 - erased.value, 1 - erased.high, 1 - erased.low)


def game_section(games: Results | None) -> str:
    """The table and the chart of the variational suite."""
    if games is None:
        return "Not measured yet."
    return f"{GAMES.format(picture=PICTURES)}\n\n{table(games.standings).strip()}"


def failed(*suites: Results | None) -> str:
    """The runs whose loss became NaN or infinite."""
    found = [f"{name} ({said})" for one in suites if one is not None for name, said in one.failed.items()]
    return f"\nFailed, and left out of all figures: {'; '.join(found)}.\n" if found else ""


GAMES = """At a constant learning rate, so that a run of few steps is the beginning of a longer one. Before its first
step a critic learns alone for as many steps as the defaults say; these are not counted.

![What is left of the target against steps, exact (full) and variational (dashed)]({picture}/variational.svg)"""

PAGE = """# Divergences against each other, and the paper's claims

Made by `python benchmarks/study.py` ({made} runs; the raw figures are in `benchmarks/results/study/`).
{device}; {versions}. A run costs {core_seconds:.0f} seconds of one core, most of them for judging.{mixed}

On the embedded pipeline, {pairs}: {steps} steps of {batch} samples, learning rate {learning_rate}, {seeds} seeds,
without preservation. With the defaults every divergence erases these concepts and keeps the rest
([erasure.md](erasure.md)), and nothing could be compared; short runs show which gets there first, and at what cost.
Judged are {images_of_target} images of the target in phrasings of the training and as many in others, and {images} of
each other class, {inference_steps} steps each, by a classifier that never saw the generator.{compared}

Figures are in percent, with 95 % intervals over seeds (Student's t) and images (bootstrap) that resample all candidates
alike, as they share both. *Erased*: images of the target that do not show it. *Retained*: images of the other classes
that show what was asked for. *Change*: mean absolute difference of these images to those before, of the pixel range; it
shows harm long before the judge does. Three seeds are few, so that the intervals are wide.

The text embeddings of this pipeline are nearly orthogonal, those of a real CLIP are not: what holds here need not hold
for Stable Diffusion, and what is not seen here may be seen there.

## Which claims hold here

| claim | here |
| --- | --- |
{verdicts}

What each rests on is [below](#the-claims-one-by-one).

## The front

![Erased against retained, with the Pareto front](results/front.svg)

![Erased against the change of the other classes' images](results/change.svg)

Filled marks are on the front, hollow ones are not; crosses are the intervals.

Means over the targets. "On the front": no other candidate both erases and retains more, and in what share of the
resamples that is so.

{table}
{failed}
What to take, by what one prefers:

{recommendations}

## By target

{by_target}

## The variational game

{games}

## The claims, one by one

A claim is tested by differences between candidates of the same targets, seeds and images, in points of percent. Where
the interval of a difference holds 0, chance may be all there is. The intervals are not corrected for their number.

{claims}
"""
