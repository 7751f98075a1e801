"""The claims that docs/results.md judges, each by the intervals of differences and by nothing else."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from fdu.comparison.front import Estimate, Sample
from fdu.comparison.page import percent
from fdu.comparison.plan import Candidate

MORE_OF = {"erased": 1, "retained": 1, "change": -1}
"""Of each figure, whether more or less of it is better."""
DIGITS = {"erased": 1, "retained": 1, "change": 2}
"""Of each figure, in percent."""


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One comparison that bears on a claim."""

    where: str
    differences: dict[str, Estimate]
    """By figure, the first minus the second."""
    bears: int | None
    """1: it is as the claim says; -1: the opposite is so; 0: chance may be all there is; None: it says nothing, since
    what keeps more erases less."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim, and what became of it here."""

    title: str
    said: str
    """The claim, and how it is tested."""
    contrasts: tuple[Contrast, ...]

    @property
    def verdict(self) -> str:
        """Whether it holds, in a few words."""
        told = [one.bears for one in self.contrasts if one.bears is not None]
        silent = len(self.contrasts) - len(told)
        if not self.contrasts:
            return "not measured yet"
        if not told:
            return f"cannot be told: in all {silent} comparisons what keeps more erases less"
        left_out = (
            f"; {silent} more say{'s' * (silent == 1)} nothing, as what keeps more there erases less" if silent else ""
        )
        return self._of(len(told), sum(one > 0 for one in told), sum(one < 0 for one in told)) + left_out

    @staticmethod
    def _of(total: int, for_it: int, against: int) -> str:
        if for_it == total:
            return f"holds: in all {total} comparisons"
        if against == total:
            return f"does not hold: the opposite in all {total} comparisons"
        if not for_it and not against:
            return f"not seen: none of {total} comparisons differs by more than chance explains"
        open_ones = f", undecided in {total - for_it - against}" if total > for_it + against else ""
        if not against:
            return f"holds in part: in {for_it} of {total} comparisons{open_ones}"
        if not for_it:
            return f"does not hold: the opposite in {against} of {total} comparisons{open_ones}"
        return f"mixed: holds in {for_it} of {total} comparisons, the opposite in {against}{open_ones}"


def dominance(sample: Sample, s0s: Sequence[float]) -> Claim:
    """The squared Hellinger against mse: better in something and worse in nothing."""
    contrasts = []
    for s0 in s0s:
        found = differences(sample, Candidate("squared_hellinger", s0), Candidate("mse", s0))
        signs = [MORE_OF[name] * one.sign for name, one in found.items()]
        better, worse = max(signs) > 0, min(signs) < 0
        contrasts.append(Contrast(f"s0 {s0:g}", found, None if better and worse else int(better) - int(worse)))
    return Claim(
        "Hellinger dominates MSE",
        "The paper: in many scenarios the squared Hellinger is better than MSE. Here: at equal steps it is better "
        "in at least one of the three figures and worse in none (squared_hellinger minus mse, mean over targets).",
        tuple(contrasts),
    )


def keeps_best(sample: Sample, s0s: Sequence[float], divergences: Sequence[str]) -> Claim:
    """The squared Hellinger against every other divergence: what of the other classes it keeps."""
    contrasts = []
    for s0 in s0s:
        for other in divergences:
            if other != "squared_hellinger":
                found = differences(sample, Candidate("squared_hellinger", s0), Candidate(other, s0))
                contrasts.append(Contrast(f"s0 {s0:g}, minus {other}", found, _kept_sign(found)))
    return Claim(
        "Hellinger keeps retained concepts best",
        "The paper: of all divergences the squared Hellinger keeps other concepts best. Here: at equal steps more of "
        "the other classes is retained than by any other divergence, or their images change less and none is lost. "
        "What erases less also harms less, so it counts only where what keeps more does not clearly erase less.",
        tuple(contrasts),
    )


def larger_gradient(sample: Sample, s0s: Sequence[float]) -> Claim:
    """Whether what amplifies large errors erases more in equal steps."""
    pairs = (("mse", "squared_hellinger"), ("pearson_chi2", "mse"))
    contrasts = []
    for s0 in s0s:
        for larger, smaller in pairs:
            found = differences(sample, Candidate(larger, s0), Candidate(smaller, s0))
            contrasts.append(Contrast(f"s0 {s0:g}, {larger} minus {smaller}", found, found["erased"].sign))
    return Claim(
        "A larger gradient erases faster",
        "The paper: gradients grow from Hellinger over MSE to chi-square, and with them the speed of unlearning. The "
        "first half is a theorem (docs/theory.md). Here the second: more is erased in equal steps, under Adam.",
        tuple(contrasts),
    )


def scale_decides(sample: Sample, s0s: Sequence[float]) -> Claim:
    """Whether divergences differ more in what they erase the larger s0 is."""
    contrasts = []
    for low, high in itertools.pairwise(s0s):
        grown = {name: _of_gaps(sample, name, high, low, -1.0) for name in MORE_OF}
        # abs(a) > abs(b) where a - b and a + b have one sign; both are linear, so their intervals are honest.
        both = _of_gaps(sample, "erased", high, low, 1.0)
        contrasts.append(Contrast(f"s0 {high:g} minus s0 {low:g}", grown, grown["erased"].sign * both.sign))
    return Claim(
        "The scale sigma decides whether the divergence matters",
        "docs/design.md: near s = 0 all divergences are one. Here: squared_hellinger and pearson_chi2 differ more in "
        "what is erased at the larger s0 (shown is the difference of the two differences, squared_hellinger minus "
        "pearson_chi2; their size has grown where it and their sum have one sign).",
        tuple(contrasts),
    )


def _of_gaps(sample: Sample, figure: str, high: float, low: float, weight: float) -> Estimate:
    """What squared_hellinger has more than pearson_chi2 at s0 ``high``, plus ``weight`` times the same at ``low``."""
    least, most = "squared_hellinger", "pearson_chi2"
    return sample.contrast(
        figure,
        (
            (Candidate(least, high), 1.0),
            (Candidate(most, high), -1.0),
            (Candidate(least, low), weight),
            (Candidate(most, low), -weight),
        ),
    )


def games_erase_faster(sample: Sample) -> Claim:
    """The variational loss against the exact one: what is erased in equal steps."""
    return Claim(
        "Variational losses erase faster",
        "The paper: they are the aggressive ones. Here: more is erased than by the exact loss of the same divergence "
        "in equal steps (variational minus exact).",
        tuple(Contrast(where, found, found["erased"].sign) for where, found in _games(sample)),
    )


def games_hurt_more(sample: Sample) -> Claim:
    """The variational loss against the exact one: what becomes of the other classes."""
    return Claim(
        "Variational losses hurt fidelity more",
        "The paper: what they erase faster costs fidelity. Here: fewer of the other classes are retained than by the "
        "exact loss in equal steps, or their images change more and none is gained (variational minus exact); counted "
        "only where what keeps more does not clearly erase less, which would explain it.",
        tuple(
            Contrast(where, found, None if (kept := _kept_sign(found)) is None else -kept)
            for where, found in _games(sample)
        ),
    )


def differences(sample: Sample, one: Candidate, other: Candidate) -> dict[str, Estimate]:
    """All figures of ``one`` minus those of ``other``."""
    return {name: sample.difference(name, one, other) for name in MORE_OF}


def rows(claim: Claim) -> list[list[str]]:
    """A table of the contrasts, in points of percent."""
    words = {1: "as claimed", 0: "undecided", -1: "the opposite", None: "what keeps more erases less"}
    return [
        [one.where, *(percent(one.differences[name], digits) for name, digits in DIGITS.items()), words[one.bears]]
        for one in claim.contrasts
    ]


def _kept_sign(found: dict[str, Estimate]) -> int | None:
    """1 where the first keeps the other classes better, -1 where the second does: by the judge's count, or, where that
    is even, by the change. None where the one that does clearly erases less, too: that may be all there is to it."""
    kept = found["retained"].sign or -found["change"].sign
    return None if kept * found["erased"].sign < 0 else kept


def _games(sample: Sample) -> list[tuple[str, dict[str, Estimate]]]:
    """Every variational candidate against the exact one that differs in nothing else."""
    found = []
    for one in sample.candidates:
        others = dict(one.others)
        if others.pop("variational", False):
            exact = dataclasses.replace(one, others=tuple(others.items()))
            words = ", ".join(f"{value} steps" for name, value in others.items() if name == "max_train_steps")
            found.append((f"{one.divergence}, {words}", differences(sample, one, exact)))
    return found
