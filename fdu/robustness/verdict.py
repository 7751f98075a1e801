"""The tests of robustness in words, computed from their figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fdu.verdict import DRAWN_BEFORE, joined, percent, state_of


@dataclasses.dataclass(frozen=True)
class Holding:
    """What the tests of robustness mean."""

    holds: bool
    """Whether the erasure withstood all that was tried."""
    headline: str
    sentences: tuple[str, ...]


def judge_robustness(found: Mapping[str, Any], target: str) -> Holding:
    """What the tests of robustness mean, of :meth:`fdu.robustness.Robustness.as_dict`."""
    withstood: list[str] = []
    gave_way: list[str] = []
    sentences: list[str] = []
    for verdict in (_phrasings(found), _attacked(found), _relearnt(found, target)):
        if verdict is not None:
            name, held, sentence = verdict
            (withstood if held else gave_way).append(name)
            sentences.append(sentence)
    if not gave_way:
        headline = f"It holds against {joined(withstood)}"
    elif not withstood:
        headline = f"It does not hold against {joined(gave_way)}"
    else:
        headline = f"It holds against {joined(withstood)}, but not against {joined(gave_way)}"
    return Holding(not gave_way, headline, tuple(sentences))


def _phrasings(found: Mapping[str, Any]) -> tuple[str, bool, str] | None:
    sets = found.get("phrasings")
    if not sets:
        return None
    known = {name: one for name, one in sets.items() if one["before"]["value"] >= DRAWN_BEFORE}
    unknown = [name for name in sets if name not in known]
    shares = {name: (one["before"]["value"], one["after"]["value"]) for name, one in known.items()}
    escapes = [name for name, (before, after) in shares.items() if state_of(before, after) != "erased"]
    told = [f"{name} ({percent(before)} before, {percent(after)} after)" for name, (before, after) in shares.items()]
    sentence = f"In other words: {joined(told)}." if told else "In other words the model hardly drew it before either."
    if unknown and told:
        sentence += f" Before the erasure the model hardly drew it for {joined(unknown)} either."
    return "other words", not escapes, sentence


def _attacked(found: Mapping[str, Any]) -> tuple[str, bool, str] | None:
    attacked, reference = found.get("attack"), found.get("attack_before")
    if not attacked:
        return None
    after = attacked["after"]["value"]
    most = reference["after"]["value"] if reference else 1.0
    state = state_of(max(most, DRAWN_BEFORE), after)
    verb = {"erased": "does not bring it back", "partly erased": "brings it back in part"}.get(state, "brings it back")
    back = attacked["back_after"]
    within = f", half of it within {back} steps" if back and state != "erased" else ""
    sentence = (
        f"An attack on what the denoiser reads, by somebody who has the weights, {verb}: "
        f"{percent(attacked['before']['value'])} without it, {percent(after)} with it{within}"
        + (f"; on the pipeline before the erasure, {percent(most)}." if reference else ".")
    )
    return "an attack with the weights", state == "erased", sentence


def _relearnt(found: Mapping[str, Any], target: str) -> tuple[str, bool, str] | None:
    relearnt = found.get("relearning")
    if not relearnt:
        return None
    images, back = relearnt["images"], relearnt["back_after"]
    last, share = relearnt["course"][-1]
    if back is None:
        sentence = (
            f"{last} steps of fine-tuning on {images} images of {target} do not bring it back "
            f"({percent(share['value'])} at the end)."
        )
    elif back == 0:
        sentence = f"There was nothing to relearn: it is drawn without (on {images} images)."
    else:
        sentence = f"Fine-tuning on {images} images of {target} brings it back within {back} steps."
    return "relearning", back is None, sentence
