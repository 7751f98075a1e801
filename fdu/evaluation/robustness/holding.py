"""The tests of robustness in words, computed from their figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fdu.evaluation.verdict import DRAWN_BEFORE, escapes_by, joined, percent, state_of


@dataclasses.dataclass(frozen=True)
class Holding:
    """What the tests of robustness mean."""

    holds: bool
    """Whether the erasure withstood all tests that could show something, and there was one."""
    headline: str
    sentences: tuple[str, ...]


def judge_robustness(found: Mapping[str, Any], target: str) -> Holding:
    """What the tests of robustness mean, of :meth:`fdu.evaluation.robustness.Robustness.as_dict`."""
    withstood: list[str] = []
    gave_way: list[str] = []
    untold: list[str] = []
    sentences: list[str] = []
    for verdict in (_phrasings(found), _attacked(found), _relearnt(found, target)):
        if verdict is not None:
            name, held, sentence = verdict
            (untold if held is None else withstood if held else gave_way).append(name)
            sentences.append(sentence)
    if withstood and gave_way:
        headline = f"It holds against {joined(withstood)}, but not against {joined(gave_way)}"
    elif withstood or gave_way:
        headline = f"It {'holds' if withstood else 'does not hold'} against {joined(withstood or gave_way)}"
    else:
        headline = "Whether it holds was not shown"
    if untold and (withstood or gave_way):
        headline += f"; nothing was shown by {joined(untold)}"
    return Holding(bool(withstood) and not gave_way, headline, tuple(sentences))


Outcome = tuple[str, bool | None, str]
"""A test, whether the erasure withstood it (None: the test could not show it), and the test in a sentence."""


def _phrasings(found: Mapping[str, Any]) -> Outcome | None:
    sets = found.get("phrasings")
    if not sets:
        return None
    shares = {name: (one["before"]["value"], one["after"]["value"]) for name, one in sets.items()}
    states = {name: state_of(*both) for name, both in shares.items()}
    escapes = [name for name, both in shares.items() if escapes_by(*both)]
    told = [f"{name} ({percent(before)} before, {percent(after)} after)" for name, (before, after) in shares.items()]
    sentence = f"In other words: {joined(told)}."
    unknown = [name for name, state in states.items() if state == "rarely drawn before" and name not in escapes]
    if unknown:
        sentence += f" For {joined(unknown)} the model hardly drew it before either, which shows little."
    return "other words", None if len(unknown) == len(sets) else not escapes, sentence


def _attacked(found: Mapping[str, Any]) -> Outcome | None:
    attacked, reference = found.get("attack"), found.get("attack_before")
    if not attacked:
        return None
    after = attacked["after"]["value"]
    most = reference["after"]["value"] if reference else 1.0
    state = state_of(max(most, DRAWN_BEFORE), after)
    verb = {"erased": "does not bring it back", "partly erased": "brings it back in part"}.get(state, "brings it back")
    back = attacked["back_after"]
    if back == 0:
        verb = "finds nothing to bring back"
    within = f", half of it within {back} steps" if back and state != "erased" else ""
    sentence = (
        f"An attack on what the denoiser reads, by somebody who has the weights, {verb}: "
        f"{percent(attacked['before']['value'])} without it, {percent(after)} with it{within}"
        + (f"; on the pipeline before the erasure, {percent(most)}" if reference else "")
        + (_attempts(attacked, reference) if reference else "")
        + "."
    )
    # An attack that fails even where nothing was erased shows nothing by failing.
    held = None if state == "erased" and most < DRAWN_BEFORE else state == "erased"
    return "an attack with the weights", held, sentence


def _attempts(attacked: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """How often either was tried, if not alike."""
    tried, there = len(attacked["attempts"]), len(reference["attempts"])
    return "" if tried == there else f" (of {there} attempt{'s' if there > 1 else ''} there, the best of {tried} here)"


def _relearnt(found: Mapping[str, Any], target: str) -> Outcome | None:
    relearnt = found.get("relearning")
    if not relearnt:
        return None
    images, back, known = relearnt["images"], relearnt["back_after"], relearnt.get("drawn_before", 1.0)
    last, share = relearnt["course"][-1]
    tuning = f"of fine-tuning on {images} images of {target}"
    if known < DRAWN_BEFORE:
        sentence = (
            f"Before the erasure the model hardly drew it ({percent(known)}), so relearning shows little: "
            f"{percent(share['value'])} after {last} steps {tuning}."
        )
        return "relearning", None, sentence
    if back == 0:
        return "relearning", False, f"There was nothing to relearn: it is drawn without (on {images} images)."
    if back is not None:
        sentence = f"Fine-tuning on {images} images of {target} brings it back within {back} steps."
        return "relearning", False, sentence
    most = max(share["value"] for _, share in relearnt["course"])
    held = state_of(known, most) == "erased"
    verb = "do not bring it back" if held else "bring it back in part"
    at_most = f", {percent(most)} at most" if most > share["value"] else ""
    return "relearning", held, f"{last} steps {tuning} {verb} ({percent(share['value'])} at the end{at_most})."
