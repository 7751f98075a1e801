"""Which candidate to take for what one prefers, in words and numbers; no winner where the intervals name none."""

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
"""So many times as much weight as erasing has retaining in the F-measure (van Rijsbergen, 1979)."""
HARDLY = 0.5
"""A target of which less than this share is erased is still there."""
FEWEST_TO_TELL = 6
"""Images; where fewer differ, all in one direction, a sign test at 5 % sees nothing (2 / 2^5 is 6 %)."""
NAMED = 4
"""So many candidates are named; of more, the number."""


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """What to take, and why."""

    prefer: Preference
    candidate: Candidate
    certain: bool
    """Whether it is better than every other one by more than chance explains, be it in the score or in the change of
    images."""
    score: Estimate
    """Its F-measure of erased and retained."""
    alike: tuple[Candidate, ...]
    """Others whose score chance may as well have put first."""
    headline: str
    sentences: tuple[str, ...]
    usable: bool = True
    """Whether there is anything to recommend."""


def recommend(sample: Sample, prefer: Preference, before: Mapping[str, float] | None = None) -> Recommendation:
    """The candidate with the best F-measure of erased and retained; of those like it, the one that changes least.

    F = (1 + b^2) e r / (b^2 e + r) of the erased share e and the retained share r is 0 where either is, so that doing
    nothing, or destroying everything, never wins. Candidates are alike if the interval of the difference to the best
    one holds 0; of these, those that erased less than half are passed over where others did, and the one whose images
    of other classes changed clearly least is taken, unless erasure is preferred: what erases less also changes less.

    Args:
        sample: the figures.
        prefer: what to recommend for.
        before: by target, the share of its images that show it before any erasure. Where it was hardly drawn, doing
            nothing would count as erasing it, and nothing is recommended. None: not known.

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
        headline = f"Nothing to recommend: before the erasure {_undrawn(undrawn)}"
    elif few and len(candidates) > 1 and erased[chosen] >= HARDLY:
        headline = f"No winner on so few images; {one.label} will do"
    else:
        headline = _headline(sample, chosen, others, certain)
    sentences = [
        *_figures_of(sample, one, score, prefer),
        *(
            ["What is hardly drawn counts as erased by whatever does nothing: draw it in other words."]
            if undrawn
            else []
        ),
        *([f"Fewer than {FEWEST_TO_TELL} images decide nothing: draw more (images_per_class)."] if few else []),
        *_alike_and_behind([candidates[place].label for place in alike], why, sample, behind, tied),
    ]
    return Recommendation(prefer, one, certain, score, others, headline, tuple(sentences), usable)


def f_measure(erased: np.ndarray, retained: np.ndarray, beta: float) -> np.ndarray:
    """(1 + beta^2) e r / (beta^2 e + r), elementwise, of e and r brought into [0, 1]; 0 where both are 0."""
    erased, retained = np.clip(erased, 0, 1), np.clip(retained, 0, 1)
    below = beta**2 * erased + retained
    product = (1 + beta**2) * erased * retained
    return np.divide(product, below, out=np.zeros_like(product), where=below > 0)


def _of_those_alike(
    sample: Sample, alike: list[int], able: list[int], values: np.ndarray, prefer: Preference
) -> tuple[int, bool, str]:
    """Which to take of candidates whose scores are alike, given those of them that erased at least half; whether it is
    better than all others by more than chance explains; and this in words."""
    passed = [sample.candidates[place].label for place in alike if place not in able]
    words = [f"Passed over, since less than half was erased: {_listed(passed)}."] if passed else []
    chosen, certain = able[0], False
    if len(able) > 1 and prefer == "erasure":
        words.append("Between them the choice is free." if not passed else "Between the others the choice is free.")
    elif len(able) > 1:
        chosen, certain, told = _least_change(sample, able, values)
        words.append(told)
    return chosen, certain and not passed, " ".join(words)


def _least_change(sample: Sample, alike: list[int], values: np.ndarray) -> tuple[int, bool, str]:
    """Of candidates whose scores are alike, the one that changes the other classes' images least, if it does so by more
    than chance explains, else the first; whether it does; and this in words."""
    change = sample.values["change"]
    if np.isnan(change[alike]).any():
        return alike[0], False, "Between them the choice is free."
    chosen = min(alike, key=lambda place: (change[place], -values[place]))
    one = sample.candidates[chosen]
    gaps = [sample.difference("change", sample.candidates[place], one) for place in alike if place != chosen]
    if any(gap.sign <= 0 for gap in gaps):
        return alike[0], False, "Nor by how much they change the images of other classes: the choice is free."
    least = min(gaps, key=lambda gap: gap.value)
    words = (
        f"Of these, {one.label} changed the images of other classes least, by {100 * change[chosen]:.2f} % of the "
        f"pixel range; the next by {100 * least.value:.2f} points more ({_range(least, 100, 2)})."
    )
    return chosen, True, words


def _undrawn(shares: Mapping[str, float]) -> str:
    """Targets that the model as it is hardly draws."""
    return _listed([f"{target!r} was drawn in {percent(share)} of its images only" for target, share in shares.items()])


def _headline(sample: Sample, chosen: int, others: Sequence[Candidate], certain: bool) -> str:
    label, count, erased = sample.candidates[chosen].label, len(sample.candidates), sample.values["erased"]
    if erased[chosen] < HARDLY:
        even = "even " if erased[chosen] >= erased.max() else ""
        return f"Nothing to recommend yet: {even}{label} erased only {percent(erased[chosen])}"
    if count == 1:
        return f"Only {label} was run"
    if certain:
        return f"Take {label}"
    if len(others) == count - 1:
        return f"No winner: none of the {count} can be told from the best; {label} will do"
    like = others[0].label if len(others) == 1 else f"one of {len(others)} like it"
    return f"No single winner: take {label}, or {like}"


def _figures_of(sample: Sample, one: Candidate, score: Estimate, prefer: Preference) -> list[str]:
    erased, retained = sample.estimate("erased", one), sample.estimate("retained", one)
    weight = {
        "preservation": f"retaining counts {BETA[prefer]:g} times as much as erasing",
        "balanced": "erasing and retaining count alike",
        "erasure": f"erasing counts {1 / BETA[prefer]:g} times as much as retaining",
    }[prefer]
    found = [
        f"{one.label} erased {percent(erased.value)} of the target's images ({_range(erased)}) and kept "
        f"{percent(retained.value)} of the others' ({_range(retained)}).",
        f"For {prefer}, {weight}: its score is {score.value:.3f} ({_range(score, 1, 3)}).",
    ]
    if erased.value < HARDLY:
        found.append("The target is mostly still there: train longer (max_train_steps) before you choose.")
    if sample.seeds == 1:
        found.append("One seed says nothing of how much seeds differ: run more before you rely on it.")
    return found


def _alike_and_behind(
    names: list[str], why: str, sample: Sample, behind: dict[int, Estimate], tied: list[int]
) -> list[str]:
    found = []
    if tied:
        found.append(
            f"{_listed(names)} cannot be told apart by the score at these numbers of seeds and images. {why}".rstrip()
        )
    lost = {place: difference for place, difference in behind.items() if place not in tied}
    if lost:
        following, gap = min(lost.items(), key=lambda item: item[1].value)
        more = f", and {len(lost) - 1} more are further behind" if len(lost) > 1 else ""
        label = sample.candidates[following].label
        whom = "the best of them" if tied else "that"
        found.append(f"{label} stands {gap.value:.3f} ({_range(gap, 1, 3)}) behind {whom}{more}.")
    return found


def _range(estimate: Estimate, scale: float = 100, digits: int = 0) -> str:
    """An interval in words; shares as percents."""
    unit = " %" if scale == 100 and digits == 0 else ""
    return f"{scale * estimate.low:.{digits}f} to {scale * estimate.high:.{digits}f}{unit}"


def _listed(names: list[str]) -> str:
    shown = names[:NAMED] + ([f"{len(names) - NAMED} more"] if len(names) > NAMED else [])
    return "; ".join(shown[:-1]) + (" and " if len(shown) > 1 else "") + shown[-1]
