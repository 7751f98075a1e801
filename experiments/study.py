"""Divergences against each other on the digits pipeline, and the paper's claims about them; writes docs/results.md.

    python experiments/study.py        # resumes where it was stopped

Takes about an hour of two cores, shared by ``--workers`` processes.

Two comparisons, with three seeds: six divergences (three targets, three values of s0), and the min-max game against the
exact divergence (one target, several numbers of steps). Runs are short and without preservation. With the defaults
every divergence erases everything (docs/erasure.md), which leaves nothing to compare.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiment import conditions, dated, fill, finding, of_total, run

from fdu.comparison.front import Estimate, Sample, complete
from fdu.comparison.page import COLOURS, Curve, curve_chart, front_chart, markdown, percent, table
from fdu.comparison.plan import Candidate, Comparison, Drawing
from fdu.comparison.results import Results, read_results
from fdu.comparison.runs import jobs as jobs_of
from fdu.comparison.sweep import Job, Records
from fdu.config import EraseConfig
from fdu.storage.output import write_text

PAIRS = (("three", "eight"), ("seven", "eight"), ("red", "green"))
"""Two digits and an ink, each towards another class, where chance does not blur what is left."""
DIVERGENCES = ("mse", "squared_hellinger", "jensen_shannon", "le_cam", "alpha:1.5", "pearson_chi2")
"""From damping large errors to amplifying them. kl trains the same model as mse, and alpha:0.3 nearly the same as
squared_hellinger, so they are left out."""
S0 = (0.3, 1.0, 10.0)
SEEDS = (0, 1, 2)
GAME_DIVERGENCES = ("kl", "jensen_shannon", "squared_hellinger")
STEPS = (20, 40, 80)
SHORT = EraseConfig(max_train_steps=40, preservation_weight=0.0)
STEADY = EraseConfig(preservation_weight=0.0, lr_scheduler="constant", learning_rate=1e-3)
"""At a constant learning rate a run of 20 steps is the beginning of one of 80."""
DRAWING = Drawing(images_per_class=32, images_of_target=96, num_inference_steps=12)


def comparisons() -> tuple[Comparison, Comparison]:
    """The divergences, and the games with the exact divergences."""
    exact = tuple(Candidate(divergence, s0) for s0 in S0 for divergence in DIVERGENCES)
    games = tuple(
        Candidate(divergence, 1.0, (*game, ("max_train_steps", count)))
        for count in STEPS
        for divergence in GAME_DIVERGENCES
        for game in ((), (("variational", True),))
    )
    return (
        Comparison("digits", PAIRS, exact, SEEDS, SHORT, drawing=DRAWING),
        Comparison("digits", PAIRS[:1], games, SEEDS, STEADY, drawing=DRAWING),
    )


def jobs(cache: Path) -> list[Job]:
    """The jobs of both comparisons, which share the record of the model before the erasures."""
    found: dict[str, Job] = {}
    for comparison in comparisons():
        anchors = dict(comparison.pairs)
        for job in jobs_of(comparison, cache):
            target = job.identity["target"]
            found.setdefault(job.name, dated(job, (target, anchors[target])))
    return list(found.values())


def write_page(results: Path, docs: Path) -> None:
    """Write page and charts from the records that are up to date; nothing while no seed has all divergences."""
    found: list[Results | None] = []
    both = comparisons()
    records = Records(results / "study.jsonl")
    current = {job.name: records.of(job.name, job.identity) for job in jobs(Path())}
    records.found = {name: record for name, record in current.items() if record is not None}
    for comparison in both:
        try:
            found.append(read_results(comparison, records))
        except ValueError as error:
            print(f"{len(comparison.candidates)} candidates: {error}")
            found.append(None)
    main, games = found
    if main is None:
        return
    write_text(docs / "results" / "front.svg", front_chart(main.standings).svg(whole=True))
    if games is not None:
        chart = curve_chart(curves(games), "steps", "share of the target's images that show it (%)")
        write_text(docs / "results" / "variational.svg", chart.svg(whole=True))
    write_text(docs / "results.md", page(main, games, sum(len(one.runs()) for one in both)))


def page(main: Results, games: Results | None, total: int) -> str:
    """docs/results.md."""
    there = [main] if games is None else [main, games]
    made = sum(len(one.comparison.runs()) - one.missing for one in there)
    failed = [f"{name} ({said})" for one in there for name, said in one.failed.items()]
    contrasts = {claim.__name__: claim(main.sample) for claim in CLAIMS}
    contrasts |= {claim.__name__: claim(games.sample) if games else [] for claim in GAME_CLAIMS}
    return fill(
        "results.md",
        made=of_total(made, total),
        **conditions(main.conditions),
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
        **{name: judged(found) for name, found in contrasts.items()},
        games=table(games.standings).strip() if games else "Not measured yet.",
        failed=f"\nFailed, and left out of all figures: {'; '.join(failed)}.\n" if failed else "",
    )


def compared(results: Results) -> str:
    """How many pairs of target and seed the figures cover, unless they cover all."""
    made = len({(target, seed) for target, _, seed in complete(results.runs, results.sample.candidates)})
    wanted = len(results.comparison.pairs) * len(results.comparison.seeds)
    if made == wanted:
        return ""
    return f" So far {made} of {wanted} pairs of target and seed are complete. The figures cover these pairs only."


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


# The claims: each is judged by intervals of differences alone.

MORE_OF = {"erased": 1, "retained": 1, "change": -1}
"""Whether more or less of a figure is better."""
DECIMALS = {"erased": 1, "retained": 1, "change": 2}
"""Decimals of a figure in percent."""
WORDS = {1: "as claimed", -1: "opposite", 0: "undecided", None: "without evidence"}
"""What a comparison says about a claim."""
HELLINGER, MSE, CHI2 = "squared_hellinger", "mse", "pearson_chi2"


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One comparison that bears on a claim."""

    where: str
    differences: dict[str, Estimate]
    """By figure, the first minus the second."""
    bears: int | None
    """1: as the claim says; -1: the opposite; 0: may be chance; None: no evidence, since the candidate that keeps more
    also erases less."""


Contrasts = list[Contrast]


def judged(contrasts: Contrasts) -> dict[str, Any]:
    """The verdict on a claim, and a table of its contrasts in percentage points."""
    rows = [
        [one.where, *(percent(one.differences[name], digits) for name, digits in DECIMALS.items()), WORDS[one.bears]]
        for one in contrasts
    ]
    header = ["", "erased", "retained", "change", ""]
    return finding(verdict([one.bears for one in contrasts]), table=markdown(header, rows) if rows else "")


def verdict(bears: Sequence[int | None]) -> str:
    """Whether a claim holds, in a few words, with the number of comparisons behind each word."""
    if not bears:
        return "not measured yet"
    told = set(bears) - {None}
    head = {
        frozenset({1}): "holds",
        frozenset({-1}): "does not hold",
        frozenset({0}): "not observed",
        frozenset({1, 0}): "holds in part",
        frozenset({-1, 0}): "does not hold",
        frozenset(): "cannot be told",
    }.get(frozenset(told), "mixed")
    counts = [f"{bears.count(sign)} {words}" for sign, words in WORDS.items() if sign in bears]
    return f"{head} ({', '.join(counts)})"


def dominance(sample: Sample) -> Contrasts:
    """The squared Hellinger against mse: better in something and worse in nothing."""
    contrasts = []
    for s0 in scales(sample):
        found = differences(sample, Candidate(HELLINGER, s0), Candidate(MSE, s0))
        signs = [MORE_OF[name] * one.sign for name, one in found.items()]
        better, worse = max(signs) > 0, min(signs) < 0
        contrasts.append(Contrast(f"s0 {s0:g}", found, None if better and worse else int(better) - int(worse)))
    return contrasts


def keeps_best(sample: Sample) -> Contrasts:
    """The squared Hellinger against every other divergence: how much of the other classes it keeps."""
    contrasts = []
    for other in sample.candidates:
        if other.divergence != HELLINGER:
            found = differences(sample, Candidate(HELLINGER, other.s0), other)
            contrasts.append(Contrast(f"s0 {other.s0:g}, minus {other.divergence}", found, kept_sign(found)))
    return contrasts


def larger_gradient(sample: Sample) -> Contrasts:
    """Whether a divergence that amplifies large errors erases more in equal steps."""
    contrasts = []
    for s0, (larger, smaller) in itertools.product(scales(sample), ((MSE, HELLINGER), (CHI2, MSE))):
        found = differences(sample, Candidate(larger, s0), Candidate(smaller, s0))
        contrasts.append(Contrast(f"s0 {s0:g}, {larger} minus {smaller}", found, found["erased"].sign))
    return contrasts


def scale_decides(sample: Sample) -> Contrasts:
    """Whether divergences differ more in what they erase the larger s0 is."""

    def gaps(figure: str, high: float, low: float, weight: float) -> Estimate:
        """By how much Hellinger exceeds chi-square at ``high``, plus ``weight`` times the same at ``low``."""
        pairs = ((HELLINGER, 1.0), (CHI2, -1.0))
        at = ((high, 1.0), (low, weight))
        return sample.contrast(figure, [(Candidate(name, s0), a * b) for name, a in pairs for s0, b in at])

    contrasts = []
    for low, high in itertools.pairwise(scales(sample)):
        grown = {name: gaps(name, high, low, -1.0) for name in MORE_OF}
        # abs(a) > abs(b) where a - b and a + b have one sign; both are linear, so their intervals are honest.
        both = gaps("erased", high, low, 1.0)
        contrasts.append(Contrast(f"s0 {high:g} minus s0 {low:g}", grown, grown["erased"].sign * both.sign))
    return contrasts


def games_erase_faster(sample: Sample) -> Contrasts:
    """The variational loss against the exact one: how much is erased in equal steps."""
    return [Contrast(where, found, found["erased"].sign) for where, found in games(sample)]


def games_hurt_more(sample: Sample) -> Contrasts:
    """The variational loss against the exact one: how well the other classes are kept."""
    kept = [(where, found, kept_sign(found)) for where, found in games(sample)]
    return [Contrast(where, found, None if sign is None else -sign) for where, found, sign in kept]


def games(sample: Sample) -> list[tuple[str, dict[str, Estimate]]]:
    """Every variational candidate against the exact one that differs in nothing else."""
    found = []
    for one in sample.candidates:
        others = dict(one.others)
        if others.pop("variational", False):
            exact = dataclasses.replace(one, others=tuple(others.items()))
            where = f"{one.divergence}, {others['max_train_steps']} steps"
            found.append((where, differences(sample, one, exact)))
    return found


def scales(sample: Sample) -> list[float]:
    """All values of s0."""
    return list(dict.fromkeys(one.s0 for one in sample.candidates))


def differences(sample: Sample, one: Candidate, other: Candidate) -> dict[str, Estimate]:
    """All figures of ``one`` minus those of ``other``."""
    return {name: sample.difference(name, one, other) for name in MORE_OF}


def kept_sign(found: dict[str, Estimate]) -> int | None:
    """1 where the first keeps the other classes better, -1 where the second does: by the judge's count, or, where that
    is even, by the change. None where the better keeper clearly erases less, which may explain it."""
    kept = found["retained"].sign or -found["change"].sign
    return None if kept * found["erased"].sign < 0 else kept


CLAIMS: tuple[Callable[[Sample], Contrasts], ...] = (dominance, keeps_best, larger_gradient, scale_decides)
GAME_CLAIMS = (games_erase_faster, games_hurt_more)
"""The claims about divergences and about games; their names are the fields of the page."""

if __name__ == "__main__":
    run(__doc__, "study", jobs, write_page)
