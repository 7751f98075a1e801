"""Fewer combinations than all: every two values of two parameters still meet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value of each axis in which any two values of different axes occur together.

    The same ones for the same axes, in the order of the product; with two axes the whole product.
    """
    places = list(itertools.combinations(range(len(axes)), 2))
    indices = list(itertools.product(*(range(len(axis)) for axis in axes)))
    open_pairs = {(a, b, one[a], one[b]) for one in indices for a, b in places}
    # Whoever comes first of equals would repeat the first values: begin where each axis has moved on by one.
    order = sorted(indices, key=lambda one: (sum(one) % max(map(len, axes)), one))
    taken = []
    while open_pairs:
        best = max(order, key=lambda one: sum((a, b, one[a], one[b]) in open_pairs for a, b in places))
        taken.append(best)
        open_pairs -= {(a, b, best[a], best[b]) for a, b in places}
    return [tuple(axis[i] for axis, i in zip(axes, one, strict=True)) for one in sorted(taken)]
