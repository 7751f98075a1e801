"""What is drawn to judge an erasure: prompts of one class each, and the part it plays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

Judge = Callable[[Tensor], list[str]]
"""Images [N, 3, H, W] in [0, 1] -> the name of the class that each one shows."""
Role = Literal["target", "unseen", "retained", "cross_domain"]
"""The erased concept; the same in phrasings that training never saw; what is to be kept; concepts of another kind."""
Group = Literal["near", "generic", "unrelated"]
"""Of what is to be kept: the target's neighbours (hard negatives); the anchor and everyday subjects, where an erasure
shows that reaches beyond its concept; and what has nothing to do with it."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """Prompts that all ask for one class, and the judge who tells whether it was drawn."""

    name: str
    """The class, as the judge names it, and as an image-text encoder reads it."""
    prompts: tuple[str, ...]
    """Phrasings, used in turn."""
    role: Role
    judge: Judge
    group: Group = "near"
    """Of a retained class; the others have none."""


def groups(probes: Sequence[Probe]) -> dict[str, list[int]]:
    """The places of the probes by role, and those of the retained ones by group as well.

    >>> groups([Probe("cat", ("a cat",), "target", list), Probe("lynx", ("a lynx",), "retained", list)])
    {'target': [0], 'retained': [1], 'near': [1]}
    """
    found: dict[str, list[int]] = {}
    for place, probe in enumerate(probes):
        found.setdefault(probe.role, []).append(place)
        if probe.role == "retained":
            found.setdefault(probe.group, []).append(place)
    return found


def check_probes(probes: Sequence[Probe]) -> None:
    """Refuse probes that tell nothing about an erasure.

    Raises:
        ValueError: not exactly one target, nothing retained, two classes of one name, or a class without a prompt.
    """
    check_prompts(probes)
    roles = [probe.role for probe in probes]
    if roles.count("target") != 1 or "retained" not in roles:
        raise ValueError("probes must hold exactly one with role 'target' and at least one with role 'retained'")
    names = [probe.name for probe in probes if probe.role != "unseen"]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"probes name the class {twice[0]!r} twice; give every class one probe")


def check_prompts(probes: Sequence[Probe]) -> None:
    """Refuse probes of which nothing can be drawn.

    Raises:
        ValueError: a class without a prompt.
    """
    for probe in probes:
        if not probe.prompts:
            raise ValueError(f"probes: the class {probe.name!r} has no prompts; give it at least one")
