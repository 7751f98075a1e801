"""The recommended candidate for each preference, in words and figures; no winner if the intervals overlap."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from fdu.comparison.front import Estimate, Sample, interval
from fdu.comparison.plan import Candidate
from fdu.evaluation.verdict import DRAWN_BEFORE, percent

Preference = Literal["preservation", "balanced", "erasure", "robustness"]
BETA: dict[Preference, float] = {"preservation": 2.0, "balanced": 1.0, "erasure": 0.5, "robustness": 1.0}
"""Weight of retaining relative to erasing in the F-measure (van Rijsbergen, 1979). For "robustness", the share that is
still erased under attack (held) takes the place of the erased share."""
WEIGHTS: dict[Preference, str] = {
    "preservation": "retaining counts twice as much as erasing",
    "balanced": "erasing and retaining count the same",
    "erasure": "erasing counts twice as much as retaining",
    "robustness": "erased under attack and retaining count the same",
}
"""The same in words."""
HARDLY = 0.5
"""Erased share below which the target is still there."""
FEWEST_TO_TELL = 6
"""Fewest images for a sign test at 5 %: if five all point in one direction, p is still 2 / 2^5 = 6 %."""
NAMED = 4
"""Most candidates named in a sentence; it gives the number of the others."""


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The candidate to use, and why."""

    prefer: Preference
    candidate: Candidate
    certain: bool
    """Whether it clearly erased at least half of the target and beats every other candidate by more than chance
    explains, in the score, in the attributes or in the change of images."""
    score: Estimate
    """Its F-measure of erased and retained."""
    tied: tuple[Candidate, ...]
    """Other candidates whose score differs from the best by no more than chance explains."""
    headline: str
    sentences: tuple[str, ...]
    usable: bool = True
    """False if no candidate can be recommended."""


def preferences(sample: Sample) -> list[Preference]:
    """The preferences that the figures can serve: "robustness" needs an attack on every model."""
    attacked = not np.isnan(sample.values["held"]).any()
    return [prefer for prefer in BETA if prefer != "robustness" or attacked]


def recommend(sample: Sample, prefer: Preference, before: Mapping[str, float] | None = None) -> Recommendation:
    """The candidate with the best F-measure of erased and retained; among ties, the one that keeps most attributes, and
    among those the one that changes images least.

    F = (1 + b^2) e r / (b^2 e + r) of the erased share e and the retained share r is 0 if either is 0, so neither
    doing nothing nor destroying everything can win. Candidates tie if the interval of their difference from the best
    contains 0. Among ties, candidates that erased less than half are skipped if others erased more. Then those are
    passed over that clearly keep less of the target's attributes than the one that keeps most. The tie goes to
    the candidate that clearly changed the images of other classes least, except for the preference "erasure", because
    a candidate that erases less also changes less. A winner is certain only if the 95 % interval of its erased share
    stays at or above one half.

    Args:
        sample: the figures.
        prefer: the preference.
        before: by target, the share of its images that show it before any erasure. If it was rarely drawn, doing
            nothing would count as erasing it, and nothing is recommended. None: unknown.

    Raises:
        ValueError: an unknown preference, or "robustness" without figures of an attack.
    """
    if prefer not in BETA:
        raise ValueError(f"prefer must be one of {', '.join(BETA)}, got {prefer!r}")
    if prefer not in preferences(sample):
        raise ValueError("prefer robustness needs an attack on every model; add --attack, or choose another preference")
    gone = _gone(prefer)
    candidates, erased = sample.candidates, sample.values[gone]
    values = f_measure(erased, sample.values["retained"], BETA[prefer])
    resampled = f_measure(sample.resampled[gone], sample.resampled["retained"], BETA[prefer])
    best, *others = np.argsort(-values, kind="stable").tolist()
    behind = {
        place: interval(float(values[best] - values[place]), resampled[:, best] - resampled[:, place])
        for place in others
    }
    ties = [best, *(place for place, difference in behind.items() if difference.sign <= 0)]
    choice = _among_ties(sample, ties, values, prefer) if len(ties) > 1 else _Choice(best, True)
    chosen, ahead, why = choice.chosen, choice.ahead, choice.why
    one, score = candidates[chosen], interval(float(values[chosen]), resampled[:, chosen])
    undrawn = {target: share for target, share in (before or {}).items() if share < DRAWN_BEFORE}
    few = min(sample.images[gone], sample.images["retained"]) < FEWEST_TO_TELL
    usable = bool(erased[chosen] >= HARDLY) and not undrawn
    doubtful = sample.estimate(gone, one).low < HARDLY
    certain = ahead and usable and len(candidates) > 1 and not few and not doubtful
    tied = tuple(candidates[place] for place in ties if place != chosen)
    if undrawn:
        shares = [f"only {percent(share)} of the images of {name!r} showed it" for name, share in undrawn.items()]
        headline = f"Nothing to recommend: {_listed(shares)} before the erasure"
    elif few and usable and len(candidates) > 1:
        headline = f"Too few images for a winner; {one.label} will do"
    elif ahead and usable and len(candidates) > 1 and doubtful:
        under = " under attack" if prefer == "robustness" else ""
        headline = f"No certain winner: {one.label} is best, but it may have erased less than half{under}"
    else:
        alike = [candidates[place] for place in ties if place not in (chosen, *choice.losing)]
        headline = _headline(sample, chosen, alike, certain, prefer)
    sentences = [*_figures_of(sample, one, score, prefer), *_lost_attributes(sample, one)]
    sentences += _held(sample, one) if prefer != "robustness" else []
    if undrawn:
        sentences.append(
            "A concept that is rarely drawn counts as erased even if nothing is done: use prompts that draw it."
        )
    if few:
        sentences.append(f"Fewer than {FEWEST_TO_TELL} images are too few for a winner: draw more (images_per_class).")
    if tied:
        names = _listed([candidates[place].label for place in ties])
        sentences.append(
            f"With these seeds and images, chance may explain the differences in score between {names}. {why}".rstrip()
        )
    lost = {place: difference for place, difference in behind.items() if place not in ties}
    if lost:
        following, gap = min(lost.items(), key=lambda item: item[1].value)
        rest = len(lost) - 1
        more = f"; {rest} other candidate{'s score' if rest > 1 else ' scores'} even lower" if rest else ""
        than = "the best of them" if tied else "that"
        sentences.append(
            f"{candidates[following].label} scores {gap.value:.3f} ({_range(gap, 1, 3)}) less than {than}{more}."
        )
    return Recommendation(prefer, one, certain, score, tied, headline, tuple(sentences), usable)


def _held(sample: Sample, one: Candidate) -> list[str]:
    """What holds under attack, which the score does not count, and which candidate holds best."""
    held = sample.values["held"]
    if np.isnan(held).any():
        return []
    best = sample.candidates[int(held.argmax())]
    told = f"Under attack {percent(sample.estimate('held', one).value)} of the target's images still do not show it"
    if sample.difference("held", best, one).sign > 0:
        told += f"; with {best.label} it is {percent(float(held.max()))} (--prefer robustness)"
    return [f"{told}."]


def f_measure(erased: np.ndarray, retained: np.ndarray, beta: float) -> np.ndarray:
    """(1 + beta^2) e r / (beta^2 e + r) elementwise, with e and r clipped to [0, 1]; 0 where both are 0."""
    erased, retained = np.clip(erased, 0, 1), np.clip(retained, 0, 1)
    below = beta**2 * erased + retained
    product = (1 + beta**2) * erased * retained
    return np.divide(product, below, out=np.zeros_like(product), where=below > 0)


class _Choice(NamedTuple):
    """The candidate to use among tied ones."""

    chosen: int
    ahead: bool
    """Whether it is better than the others by more than chance explains."""
    why: str = ""
    losing: tuple[int, ...] = ()
    """The tied candidates that clearly keep less of the target's attributes."""


def _among_ties(sample: Sample, ties: list[int], values: np.ndarray, prefer: Preference) -> _Choice:
    erased, change = sample.values[_gone(prefer)], sample.values["change"]
    able = [place for place in ties if erased[place] >= HARDLY]
    if not able:
        return _Choice(ties[0], False)
    passed = [sample.candidates[place].label for place in ties if place not in able]
    skipped = f"Skipped, because they erased less than half: {_listed(passed)}. " if passed else ""
    if len(able) == 1:
        return _Choice(able[0], False, skipped)
    losing = _losing(sample, able)
    if losing:
        labels = [sample.candidates[place].label for place in losing]
        skipped += f"Passed over, because they keep less of the target's attributes: {_listed(labels)}. "
        able = [place for place in able if place not in losing]
        if len(able) == 1:
            return _Choice(able[0], not passed, skipped, losing)
    which = "either" if len(able) == 2 else "any"
    if prefer == "erasure" or np.isnan(change[able]).any():
        rest = "the others" if skipped else "them"
        return _Choice(able[0], False, f"{skipped}{which.capitalize()} of {rest} will do.", losing)
    chosen = min(able, key=lambda place: (change[place], -values[place]))
    one = sample.candidates[chosen]
    gaps = [sample.difference("change", sample.candidates[place], one) for place in able if place != chosen]
    if any(gap.sign <= 0 for gap in gaps):
        rest = " of the others" if skipped else ""
        chance = (
            "The differences in how much they change other classes' images may also be due to chance, "
            f"so {which}{rest} will do."
        )
        return _Choice(able[0], False, skipped + chance, losing)
    least = min(gaps, key=lambda gap: gap.value)
    words = (
        f"Of these, {one.label} changed the images of other classes least: by {100 * change[chosen]:.2f} % of the "
        f"pixel range. The next changed them by {100 * least.value:.2f} points more ({_range(least, 100, 2)})."
    )
    return _Choice(chosen, not passed, skipped + words, losing)


def _losing(sample: Sample, places: Sequence[int]) -> tuple[int, ...]:
    """The candidates that clearly keep less of the target's attributes than the one that keeps most."""
    attributes = sample.values["attributes"]
    if np.isnan(attributes).any() or sample.images["attributes"] < FEWEST_TO_TELL:
        return ()
    most = sample.candidates[max(places, key=lambda place: attributes[place])]
    clear = [sample.difference("attributes", most, sample.candidates[place]).sign > 0 for place in places]
    return tuple(itertools.compress(places, clear))


def _lost_attributes(sample: Sample, one: Candidate) -> list[str]:
    """What a candidate keeps of the target's attributes, and whether another that erases as much, within chance, or
    clearly more, keeps clearly more of them."""
    kept = sample.estimate("attributes", one)
    if math.isnan(kept.value):
        return []
    found = [f"{one.label} keeps {percent(kept.value)} of the target's attributes ({_range(kept)})."]
    if sample.images["attributes"] >= FEWEST_TO_TELL:
        even = [other for other in sample.candidates if sample.difference("erased", other, one).sign >= 0]
        gaps = [(other, sample.difference("attributes", other, one)) for other in even]
        more = [(other, gap) for other, gap in gaps if gap.sign > 0]
        if more:
            other, gap = max(more, key=lambda pair: pair[1].value)
            erases = "more" if sample.difference("erased", other, one).sign > 0 else "as much, within chance,"
            found.append(
                f"{other.label} erases {erases} and keeps {100 * gap.value:.1f} points more of the "
                f"attributes ({_range(gap, 100, 1)})."
            )
    return found


def _headline(sample: Sample, chosen: int, others: Sequence[Candidate], certain: bool, prefer: Preference) -> str:
    label, count, erased = sample.candidates[chosen].label, len(sample.candidates), sample.values[_gone(prefer)]
    if erased[chosen] < HARDLY:
        even = "even " if erased[chosen] >= erased.max() else ""
        under = " under attack" if prefer == "robustness" else ""
        return f"Nothing to recommend yet: {even}{label} erased only {percent(erased[chosen])}{under}"
    if count == 1:
        return f"Only {label} was run"
    if certain:
        return f"Use {label}"
    if len(others) == count - 1:
        return f"No winner: all {count} candidates tie; {label} will do"
    like = others[0].label if len(others) == 1 else f"one of {len(others)} that tie with it"
    return f"No single winner: use {label}, or {like}"


def _gone(prefer: Preference) -> str:
    """The figure that counts as erased."""
    return "held" if prefer == "robustness" else "erased"


def _figures_of(sample: Sample, one: Candidate, score: Estimate, prefer: Preference) -> list[str]:
    erased, retained = sample.estimate(_gone(prefer), one), sample.estimate("retained", one)
    under = ", under attack," if prefer == "robustness" else ""
    found = [
        f"{one.label} erased the target{under} in {percent(erased.value)} of its images ({_range(erased)}) and kept "
        f"{percent(retained.value)} of the other classes' images ({_range(retained)}).",
        f"For the preference {prefer!r}, {WEIGHTS[prefer]}; its score is {score.value:.3f} ({_range(score, 1, 3)}).",
    ]
    how = "search for more conditionings (--robust)" if under else "train longer (max_train_steps)"
    if erased.value < HARDLY:
        found.append(f"Most images still show the target: {how} before you choose.")
    elif erased.low < HARDLY:
        found.append(
            f"The interval of that share reaches below one half: {how} or draw more images (images_per_class)."
        )
    if sample.seeds == 1:
        found.append("One seed cannot show how much results vary between seeds: run more (seeds).")
    return found


def _range(estimate: Estimate, scale: float = 100, digits: int = 0) -> str:
    """An interval in words; shares in percent."""
    unit = " %" if scale == 100 and digits == 0 else ""
    return f"{scale * estimate.low:.{digits}f} to {scale * estimate.high:.{digits}f}{unit}"


def _listed(names: list[str]) -> str:
    shown = names[:NAMED] + ([f"{len(names) - NAMED} more"] if len(names) > NAMED else [])
    return "; ".join(shown[:-1]) + (" and " if len(shown) > 1 else "") + shown[-1]
