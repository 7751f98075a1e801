"""The verdict of the robustness tests in words, computed from their figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from fdu.evaluation.verdict import DRAWN_BEFORE, ERASED_BELOW, joined, percent, spanned, state_within


@dataclasses.dataclass(frozen=True)
class Holding:
    """The meaning of the robustness tests."""

    holds: bool
    """Whether the erasure held in every conclusive test, and there was at least one."""
    headline: str
    sentences: tuple[str, ...]


class _Outcome(NamedTuple):
    test: str
    held: bool | None
    """Whether the erasure held; None: not conclusive."""
    sure: bool
    """Whether both ends of the 95 % intervals lead to the same result."""
    sentence: str


def judge_robustness(found: Mapping[str, Any], target: str) -> Holding:
    """The verdict on :meth:`fdu.evaluation.robustness.Robustness.as_dict`."""
    outcomes: list[_Outcome] = []
    if found.get("phrasings"):
        outcomes.append(_phrasings(found["phrasings"]))
    if found.get("attack"):
        outcomes.append(_attacked(found["attack"], found.get("attack_before"), target))
    if found.get("relearning"):
        outcomes.append(_relearnt(found["relearning"], target))
    for name, one in (found.get("others") or {}).items():
        outcomes.append(_tried(name, one, (found.get("others_before") or {}).get(name), target))
    claims: dict[bool, list[str]] = {True: [], False: []}
    for held, verb, word in ((True, "holds", "and"), (False, "does not hold", "or")):
        for sure, doubt in ((True, ""), (False, "probably ")):
            tests = [one.test for one in outcomes if (one.held, one.sure) == (held, sure)]
            if tests:
                claims[held].append(f"{doubt}{verb} against {joined(tests, word)}")
    told = [joined(some) for some in claims.values() if some]
    untold = [one.test for one in outcomes if one.held is None]
    headline = f"The erasure {', but '.join(told)}" if told else "The tests do not show whether the erasure holds"
    if untold and told:
        headline += f"; not conclusive: {joined(untold)}"
    return Holding(bool(claims[True]) and not claims[False], headline, tuple(one.sentence for one in outcomes))


def _told(share: Mapping[str, Any], sure: bool) -> str:
    """A share; with its interval where that leaves a doubt."""
    return percent(share["value"]) + ("" if sure else f" (interval {spanned(share['interval'])})")


def _phrasings(sets: Mapping[str, Any]) -> _Outcome:
    escapes: list[bool] = []
    withstood: list[bool] = []
    told, rare, few = [], [], []
    for name, one in sets.items():
        before, after = one["before"]["value"], one["after"]
        state, sure = state_within(max(before, DRAWN_BEFORE), after["value"], after["interval"])
        if before < DRAWN_BEFORE and state != "not erased":
            # The model hardly knew these words. They show something only if they draw the target now.
            rare.append(name)
            sure = True
        elif state == "cannot be told":
            few.append(name)
        else:
            (withstood if state == "erased" else escapes).append(sure)
        told.append(f"{name}, {percent(before)} before and {_told(after, sure)} after")
    sentence = f"In other phrasings: {'; '.join(told)}."
    if rare:
        sentence += f" Not conclusive: {joined(rare)}, since the model rarely drew the target from them even before."
    if few:
        sentence += f" Too few images to tell: {joined(few)}."
    if escapes:
        return _Outcome("other phrasings", False, any(escapes), sentence)
    return _Outcome("other phrasings", True if withstood and not few else None, all(withstood), sentence)


def _attacked(attacked: Mapping[str, Any], reference: Mapping[str, Any] | None, target: str) -> _Outcome:
    after, back = attacked["after"], attacked["back_after"]
    most = reference["after"]["value"] if reference else 1.0
    state, sure = state_within(max(most, DRAWN_BEFORE), after["value"], after["interval"])
    verb = {
        "erased": f"does not restore {target}",
        "partly erased": f"restores {target} in part",
        "cannot be told": "was judged on too few images to tell",
    }.get(state, f"restores {target}")
    if back == 0:
        verb = "has nothing to restore"
    within = f", half of the former share within {back} steps" if back and state != "erased" else ""
    sentence = (
        f"An attack on the prompt's embeddings, which needs the weights, {verb}: "
        f"{percent(attacked['before']['value'])} without the attack, {_told(after, sure)} with it{within}"
    )
    if reference:
        sentence += f"; {percent(most)} with the same attack before the erasure"
        tried, there = len(attacked["attempts"]), len(reference["attempts"])
        if tried != there:
            sentence += f" ({there} attempt{'s' if there > 1 else ''} before, the best of {tried} after)"
    # An attack that fails even before the erasure shows nothing by failing after it.
    untold = state == "cannot be told" or (state == "erased" and most < DRAWN_BEFORE)
    return _Outcome("an attack with the weights", None if untold else state == "erased", sure, f"{sentence}.")


OTHERS = {
    "words": "words before the prompts",
    "direction": "prompts without the name",
    "inversion": "an embedding trained for the name",
    "partial_noise": "noised images",
    "inpainting": "parts of images",
}
"""What each of the further attacks uses, in words."""


def _tried(name: str, found: Mapping[str, Any], reference: Mapping[str, Any] | None, target: str) -> _Outcome:
    means, after, control = OTHERS[name], found["after"], found["control"]
    most = reference["after"]["value"] if reference else 1.0
    state, sure = state_within(max(most, DRAWN_BEFORE), after["value"], after["interval"])
    # An attack that fails even before the erasure shows nothing by failing after it.
    untold = state == "cannot be told" or (state == "erased" and most < DRAWN_BEFORE)
    told = {
        "erased": f"{target} stays away",
        "partly erased": f"{target} comes back in part",
        "cannot be told": "too few images to tell",
    }.get(state, f"{target} comes back")
    sentence = f"With {means}, {told}: {_told(after, sure)} (control {percent(control['value'])}"
    sentence += f"; {percent(most)} before the erasure)." if reference else ")."
    if name == "inpainting" and state != "erased" and control["value"] > ERASED_BELOW:
        untold, sentence = True, f"{sentence} The given part alone shows {target}, so this says little."
    return _Outcome(means, None if untold else state == "erased", sure, sentence)


def _relearnt(relearnt: Mapping[str, Any], target: str) -> _Outcome:
    images, back, known = relearnt["images"], relearnt["back_after"], relearnt.get("drawn_before", 1.0)
    last, end = relearnt["course"][-1]
    tuning = f"fine-tuning on {images} images of {target}"
    if known < DRAWN_BEFORE:
        sentence = (
            f"The model rarely drew {target} even before ({percent(known)}), so relearning shows little: "
            f"{percent(end['value'])} after {last} steps of {tuning}."
        )
        return _Outcome("relearning", None, False, sentence)
    most = max((share for _, share in relearnt["course"]), key=lambda share: share["value"])
    state, sure = state_within(known, most["value"], most["interval"])
    if back == 0:
        first = _told(relearnt["course"][0][1], sure)
        sentence = f"Relearning had nothing to restore: {first} of images show the concept without it."
    elif back is not None:
        doubt = "; too few images to tell" if state == "cannot be told" else ""
        sentence = (
            f"{back} steps of {tuning} restore half of the former share; "
            f"the highest share was {_told(most, sure)}{doubt}."
        )
    else:
        verbs = {"erased": "do not restore it", "cannot be told": "were judged on too few images to tell"}
        at_end = "" if most["value"] == end["value"] else f"{percent(end['value'])} at the end, "
        sentence = (
            f"{last} steps of {tuning} {verbs.get(state, 'restore it in part')}: {at_end}{_told(most, sure)} at most."
        )
    return _Outcome("relearning", None if state == "cannot be told" else state == "erased", sure, sentence)
