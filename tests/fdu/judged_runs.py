"""Runs of a comparison made by hand: what a judge would have seen."""

from __future__ import annotations

from fdu.comparison.front import Judged
from fdu.comparison.plan import Candidate

IMAGES = 40
Runs = dict[tuple[str, Candidate, int], tuple[Judged, ...]]


def judged(
    erased: float, retained: float, change: float = 0.01, style: float | None = None, shift: int = 0
) -> tuple[Judged, ...]:
    """The target in seen and unseen phrasings, and two other classes, with these shares (of 1/40).

    ``style`` is the share (of 1/20) of the seen images that show the style that every second seen prompt asks for.
    ``shift`` says which of the images they are.
    """

    def hits(share: float) -> tuple[bool, ...]:
        shown = [index < round(share * IMAGES) for index in range(IMAGES)]
        return tuple(shown[-shift % IMAGES :] + shown[: -shift % IMAGES])

    asked: dict[str, tuple[bool | None, ...]] = {}
    if style is not None:
        asked["style"] = tuple(None if index % 2 else index < round(style * IMAGES) for index in range(IMAGES))
    changes = tuple(change + 1e-4 * (index % 3) for index in range(IMAGES))
    return (
        Judged("target", "three", hits(1 - erased), changes, asked),
        Judged("unseen", "three", hits(1 - erased), changes),
        Judged("retained", "eight", hits(retained), changes),
        Judged("cross_domain", "red", hits(retained), changes),
    )


def runs(
    figures: dict[str, tuple[float, ...]], seeds: int = 3, spread: float = 0.0, target: str = "three"
) -> tuple[Runs, list[Candidate]]:
    """Runs of divergences with the figures of :func:`judged`; seeds differ by ``spread`` in what is erased."""
    candidates = [Candidate(name) for name in figures]
    found = {
        (target, candidate, seed): judged(values[0] + spread * (seed - 1), *values[1:], shift=7 * seed)
        for candidate, values in zip(candidates, figures.values(), strict=True)
        for seed in range(seeds)
    }
    return found, candidates
