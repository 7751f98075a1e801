"""Probes: the prompts that judge an erasure, one class per probe, and the role of each class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

Judge = Callable[[Tensor], list[str]]
"""Maps images [N, 3, H, W] in [0, 1] to the name of the class that each shows."""
Role = Literal["target", "unseen", "retained", "cross_domain"]
"""The erased concept; the same in phrasings that the training never used; a class to retain; one of another kind."""
Group = Literal["near", "generic", "unrelated"]
"""Groups of retained classes: neighbours of the target (hard negatives), the anchor and everyday subjects (which show
whether an erasure reaches too far), and unrelated subjects."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """Prompts for one class, and the judge that recognises it."""

    name: str
    """Name of the class, as the judge returns it and as an image-text encoder reads it."""
    prompts: tuple[str, ...]
    """Prompts of the class, used in turn."""
    role: Role
    judge: Judge
    group: Group = "near"
    """Group of a retained class; ignored for other roles."""


def groups(probes: Sequence[Probe]) -> dict[str, list[int]]:
    """Indices of the probes by role, and of the retained ones also by group.

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
    """Refuse probes that cannot judge an erasure.

    Raises:
        ValueError: not exactly one target, no retained class, two classes with one name, or a class without prompts.
    """
    check_prompts(probes)
    roles = [probe.role for probe in probes]
    if roles.count("target") != 1 or "retained" not in roles:
        raise ValueError("probes must hold exactly one with role 'target' and at least one with role 'retained'")
    names = [probe.name for probe in probes if probe.role != "unseen"]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"probes name the class {twice[0]!r} twice; give each class one probe")


def check_prompts(probes: Sequence[Probe]) -> None:
    """Refuse probes without prompts.

    Raises:
        ValueError: a class has no prompts.
    """
    for probe in probes:
        if not probe.prompts:
            raise ValueError(f"probes: the class {probe.name!r} has no prompts; give it at least one")
