"""The verdict of the robustness tests in words, computed from their figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fdu.evaluation.verdict import DRAWN_BEFORE, escapes_by, joined, percent, state_of


@dataclasses.dataclass(frozen=True)
class Holding:
    """The meaning of the robustness tests."""

    holds: bool
    """Whether the erasure held in every conclusive test, and there was at least one."""
    headline: str
    sentences: tuple[str, ...]


def judge_robustness(found: Mapping[str, Any], target: str) -> Holding:
    """The verdict on :meth:`fdu.evaluation.robustness.Robustness.as_dict`."""
    outcomes = [one for one in (_phrasings(found), _attacked(found), _relearnt(found, target)) if one is not None]
    withstood, gave_way, untold = (
        [name for name, held, _ in outcomes if held is state] for state in (True, False, None)
    )
    if withstood and gave_way:
        headline = f"The erasure holds against {joined(withstood)}, but not against {joined(gave_way)}"
    elif withstood or gave_way:
        headline = f"The erasure {'holds' if withstood else 'does not hold'} against {joined(withstood or gave_way)}"
    else:
        headline = "The tests do not show whether the erasure holds"
    if untold and (withstood or gave_way):
        headline += f"; not conclusive: {joined(untold)}"
    return Holding(bool(withstood) and not gave_way, headline, tuple(sentence for _, _, sentence in outcomes))


Outcome = tuple[str, bool | None, str]
"""Name of a test, whether the erasure held (None: not conclusive), and a sentence on it."""


def _phrasings(found: Mapping[str, Any]) -> Outcome | None:
    sets = found.get("phrasings")
    if not sets:
        return None
    shares = {name: (one["before"]["value"], one["after"]["value"]) for name, one in sets.items()}
    states = {name: state_of(*both) for name, both in shares.items()}
    escapes = [name for name, both in shares.items() if escapes_by(*both)]
    told = [f"{name} ({percent(before)} before, {percent(after)} after)" for name, (before, after) in shares.items()]
    sentence = f"In other phrasings: {joined(told)}."
    unknown = [name for name, state in states.items() if state == "rarely drawn before" and name not in escapes]
    if unknown:
        sentence += f" Not conclusive: {joined(unknown)}, since the model rarely drew the target from them even before."
    return "other phrasings", None if len(unknown) == len(sets) else not escapes, sentence


def _attacked(found: Mapping[str, Any]) -> Outcome | None:
    attacked, reference = found.get("attack"), found.get("attack_before")
    if not attacked:
        return None
    after = attacked["after"]["value"]
    most = reference["after"]["value"] if reference else 1.0
    state = state_of(max(most, DRAWN_BEFORE), after)
    verb = {"erased": "does not restore it", "partly erased": "restores it in part"}.get(state, "restores it")
    back = attacked["back_after"]
    if back == 0:
        verb = "has nothing to restore"
    within = f", half of that within {back} steps" if back and state != "erased" else ""
    sentence = (
        f"An attack on the prompt's embeddings, which needs the weights, {verb}: "
        f"{percent(attacked['before']['value'])} without the attack, {percent(after)} with it{within}"
    )
    if reference:
        sentence += f"; {percent(most)} with the same attack before the erasure"
        tried, there = len(attacked["attempts"]), len(reference["attempts"])
        if tried != there:
            sentence += f" ({there} attempt{'s' if there > 1 else ''} before, the best of {tried} after)"
    # An attack that fails even before the erasure shows nothing by failing after it.
    held = None if state == "erased" and most < DRAWN_BEFORE else state == "erased"
    return "an attack with the weights", held, f"{sentence}."


def _relearnt(found: Mapping[str, Any], target: str) -> Outcome | None:
    relearnt = found.get("relearning")
    if not relearnt:
        return None
    images, back, known = relearnt["images"], relearnt["back_after"], relearnt.get("drawn_before", 1.0)
    last, share = relearnt["course"][-1]
    tuning = f"of fine-tuning on {images} images of {target}"
    if known < DRAWN_BEFORE:
        sentence = (
            f"The model rarely drew it even before ({percent(known)}), so relearning shows little: "
            f"{percent(share['value'])} after {last} steps {tuning}."
        )
        return "relearning", None, sentence
    if back == 0:
        return "relearning", False, "Relearning had nothing to restore: the concept is still drawn without it."
    if back is not None:
        sentence = f"Fine-tuning on {images} images of {target} brings half of it back within {back} steps."
        return "relearning", False, sentence
    most = max(share["value"] for _, share in relearnt["course"])
    held = state_of(known, most) == "erased"
    verb = "do not restore it" if held else "restore it in part"
    at_most = f", {percent(most)} at most" if most > share["value"] else ""
    return "relearning", held, f"{last} steps {tuning} {verb} ({percent(share['value'])} at the end{at_most})."
