"""The claims that docs/results.md judges, by the intervals of differences alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from experiment import finding

from fdu.comparison.front import Estimate, Sample
from fdu.comparison.page import markdown, percent
from fdu.comparison.plan import Candidate

MORE_OF = {"erased": 1, "retained": 1, "change": -1}
"""Whether more or less of a figure is better."""
DIGITS = {"erased": 1, "retained": 1, "change": 2}
"""Digits of a figure in percent."""
CLAIMS = ("dominance", "keeps_best", "larger_gradient", "scale_decides")
GAME_CLAIMS = ("games_erase_faster", "games_hurt_more")
"""Names of the functions that compare what a claim is about, and of its fields in the page."""
WORDS = {1: "as claimed", 0: "undecided", -1: "the opposite", None: "what keeps more erases less"}
HELLINGER, MSE, CHI2 = "squared_hellinger", "mse", "pearson_chi2"


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One comparison that bears on a claim."""

    where: str
    differences: dict[str, Estimate]
    """By figure, the first minus the second."""
    bears: int | None
    """1: as the claim says; -1: the opposite; 0: may be chance; None: it says nothing, since what keeps more erases
    less."""


Contrasts = list[Contrast]


def judged(contrasts: Contrasts) -> dict[str, Any]:
    """The verdict on a claim, and a table of its contrasts in points of percent."""
    rows = [
        [one.where, *(percent(one.differences[name], digits) for name, digits in DIGITS.items()), WORDS[one.bears]]
        for one in contrasts
    ]
    header = ["", "erased", "retained", "change", ""]
    return finding(verdict([one.bears for one in contrasts]), table=markdown(header, rows) if rows else "")


def verdict(bears: Sequence[int | None]) -> str:
    """Whether a claim holds, in a few words, from what its contrasts say."""
    told = [one for one in bears if one is not None]
    silent = len(bears) - len(told)
    if not bears:
        return "not measured yet"
    if not told:
        return f"cannot be told: in all {silent} comparisons the candidate that retains more erases less"
    end = (
        f"; {silent} more say{'s' * (silent == 1)} nothing, since the candidate that retains more also erases less"
        if silent
        else ""
    )
    total, for_it, against = len(told), told.count(1), told.count(-1)
    undecided = f", undecided in {total - for_it - against}" if total > for_it + against else ""
    if for_it == total:
        words = f"holds: in all {total} comparisons"
    elif against == total:
        words = f"does not hold: the opposite in all {total} comparisons"
    elif not for_it and not against:
        words = f"not seen: none of {total} comparisons differs by more than chance explains"
    elif not against:
        words = f"holds in part: in {for_it} of {total} comparisons{undecided}"
    elif not for_it:
        words = f"does not hold: the opposite in {against} of {total} comparisons{undecided}"
    else:
        words = f"mixed: holds in {for_it} of {total} comparisons, the opposite in {against}{undecided}"
    return words + end


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
    """The squared Hellinger against every other divergence: what of the other classes it keeps."""
    others = [one for one in dict.fromkeys(one.divergence for one in sample.candidates) if one != HELLINGER]
    found = {
        f"s0 {s0:g}, minus {other}": differences(sample, Candidate(HELLINGER, s0), Candidate(other, s0))
        for s0 in scales(sample)
        for other in others
    }
    return [Contrast(where, one, kept_sign(one)) for where, one in found.items()]


def larger_gradient(sample: Sample) -> Contrasts:
    """Whether what amplifies large errors erases more in equal steps."""
    found = {
        f"s0 {s0:g}, {larger} minus {smaller}": differences(sample, Candidate(larger, s0), Candidate(smaller, s0))
        for s0 in scales(sample)
        for larger, smaller in ((MSE, HELLINGER), (CHI2, MSE))
    }
    return [Contrast(where, one, one["erased"].sign) for where, one in found.items()]


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
            words = ", ".join(f"{value} steps" for name, value in others.items() if name == "max_train_steps")
            found.append((f"{one.divergence}, {words}", differences(sample, one, exact)))
    return found


def scales(sample: Sample) -> list[float]:
    """All values of s0."""
    return list(dict.fromkeys(one.s0 for one in sample.candidates))


def differences(sample: Sample, one: Candidate, other: Candidate) -> dict[str, Estimate]:
    """All figures of ``one`` minus those of ``other``."""
    return {name: sample.difference(name, one, other) for name in MORE_OF}


def kept_sign(found: dict[str, Estimate]) -> int | None:
    """1 where the first keeps the other classes better, -1 where the second does: by the judge's count, or, where that
    is even, by the change. None where the one that does also clearly erases less, which may explain it."""
    kept = found["retained"].sign or -found["change"].sign
    return None if kept * found["erased"].sign < 0 else kept
