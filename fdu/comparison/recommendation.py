"""The recommended candidate for each preference, in words and figures; no winner if the intervals overlap."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from fdu.comparison.front import Estimate, Sample, interval
from fdu.comparison.plan import Candidate
from fdu.evaluation.verdict import DRAWN_BEFORE, percent

Preference = Literal["preservation", "balanced", "erasure"]
BETA: dict[Preference, float] = {"preservation": 2.0, "balanced": 1.0, "erasure": 0.5}
"""Weight of retaining relative to erasing in the F-measure (van Rijsbergen, 1979)."""
HARDLY = 0.5
"""Erased share below which the target is still there."""
FEWEST_TO_TELL = 6
"""Images that a sign test at 5 % needs: with five, all in one direction, p is 2 / 2^5 = 6 %."""
NAMED = 4
"""Candidates named in a sentence; of further ones the number is given."""


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The candidate to use, and why."""

    prefer: Preference
    candidate: Candidate
    certain: bool
    """Whether it beats every other candidate by more than chance explains, in the score or in the change of images."""
    score: Estimate
    """Its F-measure of erased and retained."""
    alike: tuple[Candidate, ...]
    """Other candidates whose score differs from the best by no more than chance explains."""
    headline: str
    sentences: tuple[str, ...]
    usable: bool = True
    """False if no candidate can be recommended."""


def recommend(sample: Sample, prefer: Preference, before: Mapping[str, float] | None = None) -> Recommendation:
    """The candidate with the best F-measure of erased and retained; among ties, the one that changes images least.

    F = (1 + b^2) e r / (b^2 e + r) of the erased share e and the retained share r is 0 if either is 0, so neither
    doing nothing nor destroying everything can win. Candidates tie if the interval of their difference to the best
    contains 0. Among ties, those that erased less than half are skipped if others erased more. The tie goes to the
    candidate that clearly changed the images of other classes least, except for the preference "erasure": what erases
    less also changes less.

    Args:
        sample: the figures.
        prefer: the preference.
        before: by target, the share of its images that show it before any erasure. If it was rarely drawn, doing
            nothing would count as erasing it, and nothing is recommended. None: unknown.

    Raises:
        ValueError: an unknown preference.
    """
    if prefer not in BETA:
        raise ValueError(f"prefer must be one of {', '.join(BETA)}, got {prefer!r}")
    values = f_measure(sample.values["erased"], sample.values["retained"], BETA[prefer])
    resampled = f_measure(sample.resampled["erased"], sample.resampled["retained"], BETA[prefer])
    order = np.argsort(-values, kind="stable")
    best = int(order[0])
    behind = {
        int(place): interval(float(values[best] - values[place]), resampled[:, best] - resampled[:, place])
        for place in order[1:]
    }
    tied = [place for place, difference in behind.items() if difference.sign <= 0]
    candidates, alike = sample.candidates, [best, *tied]
    erased = sample.values["erased"]
    able = [place for place in alike if erased[place] >= HARDLY]
    chosen, certain, why = best, not tied, ""
    if tied and able:
        chosen, certain, why = _of_those_alike(sample, alike, able, values, prefer)
    one = candidates[chosen]
    score = interval(float(values[chosen]), resampled[:, chosen])
    others = tuple(candidates[place] for place in alike if place != chosen)
    undrawn = {target: share for target, share in (before or {}).items() if share < DRAWN_BEFORE}
    few = min(sample.images["erased"], sample.images["retained"]) < FEWEST_TO_TELL
    usable = bool(erased[chosen] >= HARDLY) and not undrawn
    certain = certain and usable and len(candidates) > 1 and not few
    if undrawn:
        headline = f"Nothing to recommend: {_undrawn(undrawn)}"
    elif few and len(candidates) > 1 and erased[chosen] >= HARDLY:
        headline = f"Too few images for a winner; {one.label} will do"
    else:
        headline = _headline(sample, chosen, others, certain)
    sentences = [
        *_figures_of(sample, one, score, prefer),
        *(
            ["A concept that is rarely drawn counts as erased even if nothing is done: use prompts that draw it."]
            if undrawn
            else []
        ),
        *([f"Fewer than {FEWEST_TO_TELL} images cannot decide: draw more (images_per_class)."] if few else []),
        *_alike_and_behind([candidates[place].label for place in alike], why, sample, behind, tied),
    ]
    return Recommendation(prefer, one, certain, score, others, headline, tuple(sentences), usable)


def f_measure(erased: np.ndarray, retained: np.ndarray, beta: float) -> np.ndarray:
    """(1 + beta^2) e r / (beta^2 e + r) elementwise, with e and r clipped to [0, 1]; 0 where both are 0."""
    erased, retained = np.clip(erased, 0, 1), np.clip(retained, 0, 1)
    below = beta**2 * erased + retained
    product = (1 + beta**2) * erased * retained
    return np.divide(product, below, out=np.zeros_like(product), where=below > 0)


def _of_those_alike(
    sample: Sample, alike: list[int], able: list[int], values: np.ndarray, prefer: Preference
) -> tuple[int, bool, str]:
    """The candidate to use among tied ones, of which ``able`` erased at least half; whether it beats the others by more
    than chance explains; and the reason in words."""
    passed = [sample.candidates[place].label for place in alike if place not in able]
    words = [f"Skipped, because they erased less than half: {_listed(passed)}."] if passed else []
    chosen, certain = able[0], False
    if len(able) > 1 and prefer == "erasure":
        words.append("Any of them will do." if not passed else "Any of the others will do.")
    elif len(able) > 1:
        chosen, certain, told = _least_change(sample, able, values)
        words.append(told)
    return chosen, certain and not passed, " ".join(words)


def _least_change(sample: Sample, alike: list[int], values: np.ndarray) -> tuple[int, bool, str]:
    """The tied candidate that changes the other classes' images least, or the first if chance may explain that; whether
    it is more than chance; and the reason in words."""
    change = sample.values["change"]
    if np.isnan(change[alike]).any():
        return alike[0], False, "Any of them will do."
    chosen = min(alike, key=lambda place: (change[place], -values[place]))
    one = sample.candidates[chosen]
    gaps = [sample.difference("change", sample.candidates[place], one) for place in alike if place != chosen]
    if any(gap.sign <= 0 for gap in gaps):
        return (
            alike[0],
            False,
            "Chance may also explain how much they change the images of other classes: any of them will do.",
        )
    least = min(gaps, key=lambda gap: gap.value)
    words = (
        f"Of these, {one.label} changed the images of other classes least: by {100 * change[chosen]:.2f} % of the "
        f"pixel range. The next changed them by {100 * least.value:.2f} points more ({_range(least, 100, 2)})."
    )
    return chosen, True, words


def _undrawn(shares: Mapping[str, float]) -> str:
    """The targets that the model rarely draws even before the erasure."""
    return _listed(
        [
            f"only {percent(share)} of the images of {target!r} show it before the erasure"
            for target, share in shares.items()
        ]
    )


def _headline(sample: Sample, chosen: int, others: Sequence[Candidate], certain: bool) -> str:
    label, count, erased = sample.candidates[chosen].label, len(sample.candidates), sample.values["erased"]
    if erased[chosen] < HARDLY:
        even = "even " if erased[chosen] >= erased.max() else ""
        return f"Nothing to recommend yet: {even}{label} erased only {percent(erased[chosen])}"
    if count == 1:
        return f"Only {label} was run"
    if certain:
        return f"Use {label}"
    if len(others) == count - 1:
        return f"No winner: all {count} candidates tie; {label} will do"
    like = others[0].label if len(others) == 1 else f"one of {len(others)} that tie with it"
    return f"No single winner: use {label}, or {like}"


def _figures_of(sample: Sample, one: Candidate, score: Estimate, prefer: Preference) -> list[str]:
    erased, retained = sample.estimate("erased", one), sample.estimate("retained", one)
    weight = {
        "preservation": f"retaining counts {BETA[prefer]:g} times as much as erasing",
        "balanced": "erasing and retaining count the same",
        "erasure": f"erasing counts {1 / BETA[prefer]:g} times as much as retaining",
    }[prefer]
    found = [
        f"{one.label} erased the target in {percent(erased.value)} of its images ({_range(erased)}) and kept "
        f"{percent(retained.value)} of the other classes' images ({_range(retained)}).",
        f"For the preference {prefer!r}, {weight}; its score is {score.value:.3f} ({_range(score, 1, 3)}).",
    ]
    if erased.value < HARDLY:
        found.append("Most images still show the target: train longer (max_train_steps) before you choose.")
    if sample.seeds == 1:
        found.append("One seed cannot show how much results vary between seeds: run more (seeds).")
    return found


def _alike_and_behind(
    names: list[str], why: str, sample: Sample, behind: dict[int, Estimate], tied: list[int]
) -> list[str]:
    found = []
    if tied:
        found.append(
            f"With these seeds and images, chance may explain the differences in score between {_listed(names)}. "
            f"{why}".rstrip()
        )
    lost = {place: difference for place, difference in behind.items() if place not in tied}
    if lost:
        following, gap = min(lost.items(), key=lambda item: item[1].value)
        more = f"; {len(lost) - 1} more score lower" if len(lost) > 1 else ""
        label = sample.candidates[following].label
        whom = "the best of them" if tied else "that"
        found.append(f"{label} scores {gap.value:.3f} ({_range(gap, 1, 3)}) less than {whom}{more}.")
    return found


def _range(estimate: Estimate, scale: float = 100, digits: int = 0) -> str:
    """An interval in words; shares in percent."""
    unit = " %" if scale == 100 and digits == 0 else ""
    return f"{scale * estimate.low:.{digits}f} to {scale * estimate.high:.{digits}f}{unit}"


def _listed(names: list[str]) -> str:
    shown = names[:NAMED] + ([f"{len(names) - NAMED} more"] if len(names) > NAMED else [])
    return "; ".join(shown[:-1]) + (" and " if len(shown) > 1 else "") + shown[-1]
