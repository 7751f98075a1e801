"""A counted share of images, with its interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fdu.evaluation.intervals import wilson


@dataclasses.dataclass(frozen=True)
class Share:
    """So many of so many images."""

    value: float
    """In [0, 1]."""
    images: int
    """How many were judged."""
    interval: tuple[float, float]
    """The 95 % interval of Wilson (1927), which also holds near 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise ValueError(f"a share must be in [0, 1], got {self.value!r}")

    @classmethod
    def of(cls, seen: Sequence[str], name: str) -> Share:
        """The share of ``name`` among what a judge saw.

        Raises:
            ValueError: it saw nothing.
        """
        if not seen:
            raise ValueError("a share needs at least one image")
        count = sum(one == name for one in seen)
        return cls(count / len(seen), len(seen), wilson(count / len(seen), len(seen)))
