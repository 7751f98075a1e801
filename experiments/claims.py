"""The paper's claims about divergences and games, each judged by intervals of differences alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiment import finding

from fdu.comparison.front import Estimate, Sample
from fdu.comparison.page import markdown, percent
from fdu.comparison.plan import Candidate

MORE_OF = {"erased": 1, "retained": 1, "attributes": 1, "change": -1}
"""Whether more or less of a figure is better."""
DECIMALS = {"erased": 1, "retained": 1, "attributes": 1, "change": 2}
"""Decimals of a figure in percent."""
WORDS = {1: "as claimed", -1: "opposite", 0: "undecided", None: "without evidence"}
"""What a comparison says about a claim."""
NOT_MEASURED = "not measured yet"
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
    return finding(verdict([one.bears for one in contrasts]), table=markdown(["", *DECIMALS, ""], rows) if rows else "")


def verdict(bears: Sequence[int | None]) -> str:
    """Whether a claim holds, in a few words, with the number of comparisons behind each word."""
    counts = [f"{bears.count(sign)} {words}" for sign, words in WORDS.items() if sign in bears]
    return f"{head(bears)} ({', '.join(counts)})" if bears else NOT_MEASURED


def head(bears: Sequence[int | None]) -> str:
    """Whether a claim holds, in a few words."""
    if not bears:
        return NOT_MEASURED
    return {
        frozenset({1}): "holds",
        frozenset({-1}): "does not hold",
        frozenset({0}): "not observed",
        frozenset({1, 0}): "holds in part",
        frozenset({-1, 0}): "does not hold",
        frozenset(): "cannot be told",
    }.get(frozenset(set(bears) - {None}), "mixed")


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


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper."""

    title: str
    parts: tuple[str, ...]
    """The suites that bear on it: "short", "whole" or "games"."""
    contrasts: Callable[[Sample], Contrasts]


CLAIMS = {
    "dominance": Claim("Hellinger dominates MSE", ("short", "whole"), dominance),
    "keeps_best": Claim("Hellinger keeps retained concepts best", ("short", "whole"), keeps_best),
    "larger_gradient": Claim("A larger gradient erases faster", ("short",), larger_gradient),
    "scale_decides": Claim("The scale sigma decides whether the divergence matters", ("short",), scale_decides),
    "games_erase_faster": Claim("Variational losses erase faster", ("games",), games_erase_faster),
    "games_hurt_more": Claim("Variational losses hurt fidelity more", ("games",), games_hurt_more),
}
"""The claims by the names of their fields on the page."""


def weigh(claim: Claim, samples: Mapping[str, Sample | None]) -> Contrasts:
    """All comparisons that bear on a claim, from the suites that there are."""
    found = []
    for part in claim.parts:
        sample = samples.get(part)
        if sample is not None:
            named = f"{part}, " if len(claim.parts) > 1 else ""
            found += [dataclasses.replace(one, where=named + one.where) for one in claim.contrasts(sample)]
    return found


def summary(found: Mapping[str, Mapping[str, Contrasts]]) -> str:
    """The verdict on each claim by pipeline, and whether the pipelines agree, as a table.

    Args:
        found: by claim and pipeline, the comparisons.
    """
    rows = []
    for name, claim in CLAIMS.items():
        heads = [head([one.bears for one in contrasts]) for contrasts in found[name].values()]
        same = "" if NOT_MEASURED in heads else "yes" if len(set(heads)) == 1 else "no"
        rows.append([claim.title, *(verdict([one.bears for one in each]) for each in found[name].values()), same])
    return markdown(["claim", *next(iter(found.values())), "do they agree?"], rows)
