"""The paper's claims about divergences and games, each judged by intervals of differences alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from experiment import FIGURES

from fdu.comparison.front import Estimate, Sample
from fdu.comparison.page import markdown, percent
from fdu.comparison.plan import Candidate

MORE_OF = {"erased": 1, "retained": 1, "attributes": 1, "change": -1}
"""Whether more or less of a figure is better."""
TRADE = 2
WORDS = {1: "as claimed", -1: "opposite", TRADE: "a trade-off", 0: "undecided", None: "without evidence"}
"""What a comparison says about a claim."""
UNMEASURED, UNKNOWN = "not measured yet", "cannot be told"
HELLINGER, MSE, CHI2 = "squared_hellinger", "mse", "pearson_chi2"
Differences = dict[str, Estimate]
"""By figure, that of one candidate minus that of another."""


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One comparison that bears on a claim."""

    where: str
    differences: Differences
    bears: int | None
    """1: as the claim says; -1: the opposite; TRADE: better in one figure and worse in another, where the claim says
    better; 0: may be chance; None: no evidence, since the candidate that keeps more also erases less, or since both
    have erased nothing or everything."""


Contrasts = list[Contrast]


def told(contrasts: Contrasts) -> str:
    """The comparisons as a table, in percentage points."""
    rows = [
        [one.where, *(percent(one.differences[name], digits) for name, digits in FIGURES.items()), WORDS[one.bears]]
        for one in contrasts
    ]
    return markdown(["", *FIGURES, ""], rows) if rows else ""


def verdict(bears: Sequence[int | None]) -> str:
    """Whether a claim holds, in a few words, with the number of comparisons behind each word."""
    counts = [f"{bears.count(sign)} {words}" for sign, words in WORDS.items() if sign in bears]
    return f"{head(bears)} ({', '.join(counts)})" if bears else UNMEASURED


def head(bears: Sequence[int | None]) -> str:
    """Whether a claim holds, in a few words. Comparisons without evidence do not count; a trade-off counts against. A
    claim does not hold if two comparisons or half of them are against it and none is for it."""
    if not bears:
        return UNMEASURED
    signs = [-1 if one == TRADE else one for one in bears if one is not None]
    for_it, against = signs.count(1), signs.count(-1)
    if not signs:
        return UNKNOWN
    if for_it and against:
        return "mixed"
    if not for_it and not against:
        return "not observed"
    if against >= min(2, len(signs) / 2):
        return "does not hold"
    if 2 * (for_it + against) < len(signs):
        return "mostly not observed"
    return "holds" if for_it == len(signs) else "holds in part"


Pairs = Iterable[tuple[str, Candidate, Candidate]]


def contrasts(
    sample: Sample, pairs: Pairs, judge: Callable[[Differences], int | None], incomplete: bool = False
) -> Contrasts:
    """Comparisons of pairs of candidates, the first minus the second; those of a candidate that failed are left out.

    Args:
        incomplete: two candidates that have both erased nothing, or both everything, are no evidence.
    """
    found = []
    for where, one, other in pairs:
        if {one, other} <= {*sample.candidates}:
            differences = {name: sample.difference(name, one, other) for name in MORE_OF}
            reached = {sample.estimate("erased", each).value for each in (one, other)}
            bears = None if incomplete and reached in ({0.0}, {1.0}) else judge(differences)
            found.append(Contrast(where, differences, bears))
    return found


def dominance(sample: Sample) -> Contrasts:
    """The squared Hellinger against mse: better in something and worse in nothing."""

    def judge(found: Differences) -> int:
        signs = [MORE_OF[name] * one.sign for name, one in found.items()]
        better, worse = max(signs) > 0, min(signs) < 0
        return TRADE if better and worse else int(better) - int(worse)

    pairs = [(f"s0 {s0:g}", Candidate(HELLINGER, s0), Candidate(MSE, s0)) for s0 in scales(sample)]
    return contrasts(sample, pairs, judge)


def keeps_best(sample: Sample) -> Contrasts:
    """The squared Hellinger against every other divergence: how much of the other classes it keeps."""
    pairs = [
        (f"s0 {other.s0:g}, minus {other.divergence}", Candidate(HELLINGER, other.s0), other)
        for other in sample.candidates
        if other.divergence != HELLINGER
    ]
    return contrasts(sample, pairs, kept_sign)


def larger_gradient(sample: Sample) -> Contrasts:
    """Whether a divergence that amplifies large errors erases more in equal steps."""
    pairs = [
        (f"s0 {s0:g}, {larger} minus {smaller}", Candidate(larger, s0), Candidate(smaller, s0))
        for s0, (larger, smaller) in itertools.product(scales(sample), ((MSE, HELLINGER), (CHI2, MSE)))
    ]
    return contrasts(sample, pairs, erased_sign, incomplete=True)


def scale_decides(sample: Sample) -> Contrasts:
    """Whether divergences differ more in what they erase the larger s0 is."""

    def gaps(figure: str, high: float, low: float, weight: float) -> Estimate:
        """By how much Hellinger exceeds chi-square at ``high``, plus ``weight`` times the same at ``low``."""
        pairs = ((HELLINGER, 1.0), (CHI2, -1.0))
        at = ((high, 1.0), (low, weight))
        return sample.contrast(figure, [(Candidate(name, s0), a * b) for name, a in pairs for s0, b in at])

    found = []
    for low, high in itertools.pairwise(scales(sample)):
        if not {Candidate(name, s0) for name in (HELLINGER, CHI2) for s0 in (low, high)} <= {*sample.candidates}:
            continue
        grown = {name: gaps(name, high, low, -1.0) for name in MORE_OF}
        # abs(a) > abs(b) where a - b and a + b have one sign; both are linear, so their intervals are honest.
        both = gaps("erased", high, low, 1.0)
        found.append(Contrast(f"s0 {high:g} minus s0 {low:g}", grown, grown["erased"].sign * both.sign))
    return found


def games_erase_faster(sample: Sample) -> Contrasts:
    """The variational loss against the exact one: how much is erased in equal steps."""
    return contrasts(sample, games(sample), erased_sign, incomplete=True)


def games_hurt_more(sample: Sample) -> Contrasts:
    """The variational loss against the exact one: how well the other classes are kept."""

    def judge(found: Differences) -> int | None:
        sign = kept_sign(found)
        return None if sign is None else -sign

    return contrasts(sample, games(sample), judge)


def games(sample: Sample) -> Pairs:
    """Every variational candidate, and the exact one of the same settings. Their batches differ: the critic's warm-up
    takes the first ones."""
    for one in sample.candidates:
        others = dict(one.others)
        if others.pop("variational", False):
            exact = dataclasses.replace(one, others=tuple(others.items()))
            yield f"{one.divergence}, {others['max_train_steps']} steps", one, exact


def scales(sample: Sample) -> list[float]:
    """All values of s0."""
    return list(dict.fromkeys(one.s0 for one in sample.candidates))


def erased_sign(found: Differences) -> int:
    """1 where the first erases more, -1 where the second does."""
    return found["erased"].sign


def kept_sign(found: Differences) -> int | None:
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


def summary(samples: Mapping[str, Mapping[str, Sample | None]]) -> str:
    """The verdict on each claim by pipeline, and whether the suites that all pipelines have give the same answer: it
    holds, at least in part; it does not, or is not observed; mixed. As a table.

    Args:
        samples: by pipeline and suite.
    """

    def bears(claim: Claim, model: str, parts: Sequence[str]) -> list[int | None]:
        return [one.bears for one in weigh(dataclasses.replace(claim, parts=tuple(parts)), samples[model])]

    rows = []
    for claim in CLAIMS.values():
        shared = [part for part in claim.parts if all(part in one for one in samples.values())]
        heads = {head(bears(claim, model, shared)) for model in samples}
        answers = {"holds" if one.startswith("holds") else "mixed" if one == "mixed" else "not" for one in heads}
        same = "" if heads & {UNMEASURED, UNKNOWN} else "yes" if len(answers) == 1 else "no"
        rows.append([claim.title, *(verdict(bears(claim, model, claim.parts)) for model in samples), same])
    return markdown(["claim", *samples, "same answer?"], rows)
