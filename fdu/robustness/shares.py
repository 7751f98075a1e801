"""A counted share of images, with its interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

Z = 1.959963984540054
"""Half the width of the 95 % interval of a standard normal variable."""


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
        return cls(count / len(seen), len(seen), wilson(count, len(seen)))


def wilson(count: int, images: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share counted ``count`` times in ``images``.

    >>> [round(end, 4) for end in wilson(0, 32)]
    [0.0, 0.1072]
    """
    share, weight = count / images, Z * Z / images
    middle = (share + weight / 2) / (1 + weight)
    half = Z * math.sqrt(share * (1 - share) / images + weight / (4 * images)) / (1 + weight)
    # At the ends the bound is 0 or 1 itself, which rounding would miss.
    return (0.0 if count == 0 else middle - half), (1.0 if count == images else middle + half)
