"""Divergences against each other on the embedded pipeline, and the paper's claims about them; writes docs/results.md.

    python experiments/study.py                             # resumes where it was stopped
    python experiments/study.py --only study_variational    # one suite

Takes about an hour of two cores, shared by ``--workers`` processes.

Suites: "study_divergences" (three targets, six divergences, three values of s0, three seeds) and "study_variational"
(the min-max game against the exact divergence, one target, after several numbers of steps, three seeds). Runs are short
and without preservation: with the defaults every divergence erases everything (docs/erasure.md), and there would be
nothing to compare.
"""

from __future__ import annotations

from pathlib import Path

import study_claims as claims
from experiment import conditions, fill, of_total, run

from fdu.comparison.front import Estimate, Sample, complete
from fdu.comparison.page import COLOURS, Curve, curve_chart, front_chart, markdown, percent, table
from fdu.comparison.plan import Candidate, Comparison, Drawing
from fdu.comparison.results import Results, read_results
from fdu.comparison.runs import identity_of, jobs
from fdu.comparison.sweep import Records
from fdu.config import EraseConfig
from fdu.storage.output import write_text

MAIN, GAMES = "study_divergences", "study_variational"
PAIRS = (("three", "eight"), ("seven", "eight"), ("red", "green"))
"""Two digits and an ink, each towards another class, where chance does not blur what is left."""
DIVERGENCES = ("mse", "squared_hellinger", "jensen_shannon", "le_cam", "alpha:1.5", "pearson_chi2")
"""From damping large errors to amplifying them. kl trains what mse trains, and alpha:0.3 nearly what squared_hellinger
does; le_cam and alpha:1.5 take their places."""
S0 = (0.3, 1.0, 10.0)
SEEDS = (0, 1, 2)
GAME_DIVERGENCES = ("kl", "jensen_shannon", "squared_hellinger")
STEPS = (20, 40, 80)
SHORT = EraseConfig(max_train_steps=40, preservation_weight=0.0)
STEADY = EraseConfig(preservation_weight=0.0, lr_scheduler="constant", learning_rate=1e-3)
"""At a constant learning rate a run of 20 steps is the beginning of one of 80."""
DRAWING = Drawing(images_per_class=32, images_of_target=96, num_inference_steps=12)


def comparisons() -> dict[str, Comparison]:
    """The suites by name."""
    exact = tuple(Candidate(divergence, s0) for s0 in S0 for divergence in DIVERGENCES)
    games = tuple(
        Candidate(divergence, 1.0, (*game, ("max_train_steps", count)))
        for count in STEPS
        for divergence in GAME_DIVERGENCES
        for game in ((), (("variational", True),))
    )
    return {
        MAIN: Comparison("embedded", PAIRS, exact, SEEDS, SHORT, drawing=DRAWING),
        GAMES: Comparison("embedded", PAIRS[:1], games, SEEDS, STEADY, drawing=DRAWING),
    }


def write_page(folder: Path, docs: Path) -> None:
    """Write page and charts from the records that are there; nothing while no seed has all divergences."""
    found: dict[str, Results | None] = {}
    made = total = 0
    for name, comparison in comparisons().items():
        path = folder / f"{name}.jsonl"
        records = Records(path)
        made += sum(records.of(run.name, identity_of(comparison, run)) is not None for run in comparison.runs())
        total += len(comparison.runs())
        try:
            found[name] = read_results(comparison, path)
        except ValueError as error:
            print(f"{name}: {error}")
            found[name] = None
    main, games = found[MAIN], found[GAMES]
    if main is None:
        return
    pictures = docs / "results"
    write_text(pictures / "front.svg", front_chart(main.standings).svg(whole=True))
    write_text(pictures / "change.svg", front_chart(main.standings, "change").svg(whole=True))
    if games is not None:
        chart = curve_chart(curves(games), "steps", "share of the target's images that show it (%)")
        write_text(pictures / "variational.svg", chart.svg(whole=True))
    write_text(docs / "results.md", page(main, games, of_total(made, total)))


def page(main: Results, games: Results | None, made: str) -> str:
    """docs/results.md."""
    contrasts = {name: getattr(claims, name)(main.sample) for name in claims.CLAIMS}
    contrasts |= {name: getattr(claims, name)(games.sample) if games else [] for name in claims.GAME_CLAIMS}
    return fill(
        "results.md",
        made=made,
        **conditions(main.conditions, without=("fdu",)),
        main=main.comparison,
        core_seconds=main.core_seconds,
        mixed=f" {main.mixed_note}" if main.mixed else "",
        pairs=", ".join(f"{target} to {anchor}" for target, anchor in main.comparison.pairs),
        seeds=len(main.comparison.seeds),
        compared=compared(main),
        table=table(main.standings).strip(),
        by_target=by_target(main),
        recommendations="\n".join(
            f"* **{prefer}**: {one.headline}. {' '.join(one.sentences)}" for prefer, one in main.recommendations.items()
        ),
        **{name: claims.judged(found) for name, found in contrasts.items()},
        games=table(games.standings).strip() if games else "Not measured yet.",
        failed=failed(main, games),
    )


def compared(results: Results) -> str:
    """How many seeds of the targets all candidates have, unless it is all."""
    whole = complete(results.runs, results.sample.candidates)
    blocks = {(target, seed) for target, _, seed in whole}
    wanted = len(results.comparison.pairs) * len(results.comparison.seeds)
    if len(blocks) == wanted:
        return ""
    return f" So far {len(blocks)} of {wanted} pairs of target and seed are complete, and the figures are theirs."


def by_target(results: Results) -> str:
    """What each candidate erased and retained, target by target."""
    whole = complete(results.runs, results.sample.candidates)
    samples = {
        target: Sample({key: run for key, run in whole.items() if key[0] == target}, results.sample.candidates)
        for target in dict.fromkeys(target for target, _, _ in whole)
    }
    figures = ("erased", "retained")
    rows = [
        [one.label, *(percent(sample.estimate(name, one)) for sample in samples.values() for name in figures)]
        for one in results.sample.candidates
    ]
    return markdown(["candidate", *(f"{target}, {name}" for target in samples for name in figures)], rows)


def curves(games: Results) -> list[Curve]:
    """The share of the target that is left against steps: one curve per divergence, exact and variational."""
    found: dict[tuple[str, bool], list[tuple[float, Estimate]]] = {}
    for one in games.sample.candidates:
        others, erased = dict(one.others), games.sample.estimate("erased", one)
        left = Estimate(1 - erased.value, 1 - erased.high, 1 - erased.low)
        found.setdefault((one.divergence, "variational" in others), []).append((others["max_train_steps"], left))
    names = list(dict.fromkeys(divergence for divergence, _ in found))
    return [
        Curve(
            f"{divergence}{', variational' if game else ''}",
            sorted(points, key=lambda point: point[0]),
            COLOURS[names.index(divergence)],
            dashed=game,
        )
        for (divergence, game), points in found.items()
    ]


def failed(*suites: Results | None) -> str:
    """The runs whose loss became NaN or infinite."""
    found = [f"{name} ({said})" for one in suites if one is not None for name, said in one.failed.items()]
    return f"\nFailed, and left out of all figures: {'; '.join(found)}.\n" if found else ""


if __name__ == "__main__":
    run(__doc__, lambda cache: {name: jobs(one, cache) for name, one in comparisons().items()}, write_page)
